"""The gate of every export: what is on the disk is read again and compared with what was meant to be written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pronghorn.errors import ExportMismatch
from pronghorn.export.safetensors_file import DTYPE_NAMES, Entry


def verify_export(folder: Path, entries: Sequence[Entry]) -> None:
    """Compare names, shapes and dtypes of all safetensors files of a folder with the entries.

    safetensors itself checks that each file is as long as its header promises.

    Raises:
        ExportMismatch: naming the first difference.
    """
    written: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    part = file.get_slice(name)
                    written[name] = (tuple(part.get_shape()), str(part.get_dtype()))
        except SafetensorError as error:
            raise ExportMismatch(f"{path.name} cannot be read back: {error}", fix="save again") from error
    expected = {entry.name: (entry.shape, DTYPE_NAMES[entry.dtype]) for entry in entries}
    for name in sorted(expected.keys() | written.keys()):
        if expected.get(name) != written.get(name):
            raise ExportMismatch(
                f"{name} was to be {_shown(expected.get(name))} and is {_shown(written.get(name))}",
                where=str(folder),
                fix="save again; report it if it stays",
            )


def _shown(item: tuple[tuple[int, ...], str] | None) -> str:
    return "absent" if item is None else f"{item[1]} {list(item[0])}"
