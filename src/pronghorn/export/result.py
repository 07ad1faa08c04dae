"""What an export hands back, and how one that failed is marked."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from pronghorn.errors import ExportDiffers
from pronghorn.export.gate import Checked

logger = logging.getLogger("pronghorn")

#: A folder's mark; a file's is its own name and this.
FAILED = ".failed.txt"
FOLDER_MARK = f"export{FAILED}"


@dataclass
class Export:
    """What was written: the folder, the files the export is about (the folder itself for a checkpoint or an adapter),
    in the order asked for, and what the gate found. As a path it is the folder."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    checks: list[Checked] = field(default_factory=list)

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def failed(self) -> list[Checked]:
        return [found for found in self.checks if not found.passed]


def mark_failed(mark: Path, found: Checked) -> None:
    """Leave a file beside an export that says what is wrong with it; nothing where it passed."""
    if not found.passed:
        mark.write_text(f"{found}\n", encoding="utf-8")


def settle(export: Export, fix: str) -> Export:
    """Say what the gate found.

    Args:
        fix: what helps where it failed.

    Raises:
        ExportDiffers: naming each file or folder that failed; `export` is on the error, what was written stays.
    """
    for found in export.checks:
        logger.info("pronghorn: %s", found)
    if not export.failed:
        return export
    error = ExportDiffers(
        "; ".join(
            f"{found.name} differs from the model: {', '.join(found.problems)}" for found in export.failed
        ),
        where=str(export.folder),
        fix=f"{fix}; what was written is kept and marked (*{FAILED})",
    )
    error.export = export
    raise error
