"""A notebook's code as a script: the cells behind one another, without what only a notebook's shell does."""

from __future__ import annotations

import ast
import atexit
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pronghorn.errors import CommandMisused

#: A line for the notebook's shell: `!pip install x`, `%pip install x`, `?name`; also behind an assignment.
_SHELL = re.compile(r"^(\s*)(?:[!%?]|[\w, ]+=\s*[!%](?=\w))")
#: Magic of a whole cell that leaves its lines Python.
_STILL_PYTHON = ("%%capture", "%%time", "%%timeit")


@dataclass(frozen=True)
class Notebook:
    """The code of a notebook.

    Args:
        file: the script that it was written to, for as long as this process lasts.
        places: of each of its lines, (cell, line in the cell), both from 1; cells are counted as the notebook shows
            them, those of text included.
    """

    file: Path
    places: tuple[tuple[int, int], ...]

    def place(self, line: int) -> str:
        """A line of the script, as a person finds it."""
        cell, inside = self.places[line - 1]
        return f"cell {cell}, line {inside}"


#: by path and time of its last change
_WRITTEN: dict[tuple[Path, int], Notebook] = {}


def as_script(notebook: str | Path) -> Notebook:
    """Write a notebook's code to a temporary file; the same one when it is asked for again.

    Raises:
        CommandMisused: it is no notebook, or none of Python.
    """
    path = Path(notebook).resolve()
    key = path, path.stat().st_mtime_ns
    if key in _WRITTEN:
        return _WRITTEN[key]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cells = [cell for cell in content["cells"] if isinstance(cell, dict)]
    except (ValueError, KeyError, TypeError) as error:
        raise CommandMisused(
            f"'{notebook}' cannot be read as a notebook", fix="save it as .ipynb again, or give a Python file"
        ) from error
    language = content.get("metadata", {}).get("kernelspec", {}).get("language", "python")
    if language.lower() != "python":
        raise CommandMisused(f"'{notebook}' is a notebook of {language}", fix="give one of Python")
    lines, places = [], []
    for number, cell in enumerate(cells, 1):
        for inside, line in enumerate(_code(cell), 1):
            lines.append(line)
            places.append((number, inside))
    folder = tempfile.mkdtemp(prefix="notebook-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = Path(folder) / f"{path.stem}.py"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _WRITTEN[key] = Notebook(file, tuple(places))
    return _WRITTEN[key]


def _code(cell: dict[str, Any]) -> list[str]:
    """A cell's lines of Python, one for each of its lines; nothing for a cell of text or of another language."""
    if cell.get("cell_type") != "code":
        return []
    source = cell.get("source", "")
    lines = (source if isinstance(source, str) else "".join(source)).splitlines()
    first = next((line.strip() for line in lines if line.strip()), "")
    if first.startswith("%%") and not first.startswith(_STILL_PYTHON):
        return [f"# {line}" for line in lines]
    if _is_python(lines):  # lines of a text, or behind a bracket, may begin as the shell's do
        return lines
    code: list[str] = []
    goes_on = False
    for line in lines:
        shell = _SHELL.match(line)
        if goes_on:
            code.append(f"# {line.strip()}")
        elif shell is not None:  # a statement, since it may be all that an `if` has
            code.append(f"{shell[1]}pass  # {line.strip()}")
        else:
            code.append(line)
        goes_on = (goes_on or shell is not None) and line.rstrip().endswith("\\")
    return code


def _is_python(lines: list[str]) -> bool:
    try:
        ast.parse("\n".join(lines))
    except (SyntaxError, ValueError):
        return False
    return True
