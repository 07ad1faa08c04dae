"""A script written for Unsloth, run unchanged in this process."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pronghorn.compat.aliases import DropIn
from pronghorn.errors import CommandMisused


def run_script(
    script: str | Path, arguments: Sequence[str] = (), models: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a file as `python script.py arguments` would, with this library in Unsloth's place.

    Args:
        models: model id of the script -> folder or id that is loaded instead (see `DropIn`).

    Returns:
        the script's globals when it ended.

    Raises:
        CommandMisused: there is no such file.
        whatever the script raises.
    """
    path = Path(script)
    if not path.is_file():
        raise CommandMisused(f"there is no script '{script}'", fix="give the path of a Python file")
    before = sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = [str(script), *arguments], [str(path.resolve().parent)]
    try:
        with DropIn(models):
            return runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before
