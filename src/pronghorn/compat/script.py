"""A script or a notebook written for Unsloth, run unchanged in this process."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pronghorn.compat.aliases import DropIn
from pronghorn.compat.notebook import as_script
from pronghorn.errors import CommandMisused


def run_script(
    script: str | Path, arguments: Sequence[str] = (), models: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a file as `python script.py arguments` would, with this library in Unsloth's place.

    Args:
        script: a Python file, or a notebook, whose cells run behind one another (see `notebook.as_script`).
        models: model id of the script -> folder or id that is loaded instead (see `DropIn`).

    Returns:
        the script's globals when it ended.

    Raises:
        CommandMisused: there is no such file, or it is no notebook.
        whatever the script raises.
    """
    path = Path(script)
    if not path.is_file():
        raise CommandMisused(f"there is no script '{script}'", fix="give the path of a Python file")
    notebook = path.suffix == ".ipynb"
    code = as_script(path).file if notebook else path
    before = sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = [str(script), *arguments], [str(path.resolve().parent)]
    try:
        with DropIn(models):
            shown = {"display": print} if notebook else None
            return runpy.run_path(str(code), init_globals=shown, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before
