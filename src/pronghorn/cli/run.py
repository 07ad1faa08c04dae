"""``pronghorn run script.py``: a script or a notebook written for Unsloth, unchanged, on this library."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from argparse import Namespace
from pathlib import Path
from types import TracebackType
from typing import Any

from pronghorn.errors import CommandMisused, DropInUnavailable, NotInDropIn, PronghornError

EXIT_SCRIPT_FAILED = 1
EXIT_USER_ERROR = 2


def register(commands: Any) -> None:
    """Add ``run`` to the parser's commands."""
    import argparse

    command = commands.add_parser(
        "run",
        help="run a script or a notebook written for Unsloth, unchanged",
        description="In the script's process, unsloth and unsloth_zoo are this library, and so are the script's "
        "trl.SFTTrainer and trl.SFTConfig. Nothing else changes.",
    )
    command.add_argument(
        "--model",
        action="append",
        default=[],
        dest="models",
        metavar="[ID=]FOLDER",
        help="load this where the script names ID, or any id under unsloth/ (repeatable)",
    )
    command.add_argument("script", metavar="SCRIPT.py", help="or a notebook, SCRIPT.ipynb")
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own")


def run(options: Namespace) -> int:
    """Returns 0, 2 for a mistake that is explained, 1 for any other exception of the script."""
    # Notes on what this library and PEFT call of Transformers, and on an optional kernel of bitsandbytes.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl)\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from pronghorn.compat.script import run_script

    if Path(options.script).suffix in (".yaml", ".yml"):
        raise CommandMisused(
            f"'{options.script}' is a configuration, not a Python script",
            fix=f"pronghorn train {options.script}",
        )
    models = dict(_redirection(given) for given in options.models)
    try:
        run_script(options.script, options.arguments, models)
    except Exception as error:
        if options.debug:
            raise
        return _tell(error, options.script)
    return 0


def _redirection(given: str) -> tuple[str, str]:
    """`ID=FOLDER`, or `FOLDER` for every id under `unsloth/`."""
    name, sign, folder = given.partition("=")
    name, folder = (name, folder) if sign else ("", given)
    if not folder:
        raise CommandMisused(f"--model '{given}' names no model", fix="--model ID=FOLDER or --model FOLDER")
    return name, str(Path(folder).resolve()) if Path(folder).exists() else folder


def _tell(error: Exception, script: str) -> int:
    """One line for an error of this library, with the script's line; Python's own traceback for any other."""
    from pronghorn.compat.notebook import as_script

    notebook = as_script(script) if Path(script).suffix == ".ipynb" and Path(script).is_file() else None
    code = script if notebook is None else str(notebook.file)
    shown = _from_script(error.__traceback__, code)
    lines = [f.lineno for f in traceback.extract_tb(shown) if Path(f.filename) == Path(code) and f.lineno]
    place = "" if not lines else f"line {lines[-1]}" if notebook is None else notebook.place(lines[-1])
    at = f"{script}, {place}: " if place else ""
    if isinstance(error, PronghornError):
        print(f"pronghorn: {at}{error}", file=sys.stderr)
        return EXIT_USER_ERROR
    traceback.print_exception(type(error), error, shown)
    if notebook is not None and place:
        print(f"pronghorn: that is {script}, {place}", file=sys.stderr)
    from pronghorn.diagnostics.translate import translate

    known = _missing(error, shown) or translate(error)
    if known is not None:
        print(f"pronghorn: {known}", file=sys.stderr)
    return EXIT_SCRIPT_FAILED if known is None else EXIT_USER_ERROR


def _missing(error: Exception, shown: TracebackType | None) -> PronghornError | None:
    """What an import of the script's own means, which is not that of a library; None for any other error."""
    if not isinstance(error, ImportError) or shown is None or shown.tb_next is not None:
        return None
    if (error.name or "").partition(".")[0] == "vllm":
        return DropInUnavailable(
            "the script imports vllm, which has no part here",
            fix="FastLanguageModel.for_inference(model), then model.generate(**inputs), on pronghorn's engine",
        )
    if isinstance(error, ModuleNotFoundError):
        return None
    return NotInDropIn(
        f"{error.msg}", fix="this version has it no more, or elsewhere: change the script's import"
    )


def _from_script(tb: TracebackType | None, script: str) -> TracebackType | None:
    """The traceback from the script's own frame on; all of it where the script was not reached."""
    at = tb
    while at is not None and Path(at.tb_frame.f_code.co_filename) != Path(script):
        at = at.tb_next
    return at or tb
