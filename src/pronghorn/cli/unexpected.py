"""What the command prints for an exception that is not this library's: the error it means, or how to report it."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from pronghorn import __version__
from pronghorn.cli.console import first_line
from pronghorn.errors import PronghornError

HOW_TO_REPORT = (
    "Please report it, with the traceback and the output of `pronghorn doctor --json`. "
    "`pronghorn explain` lists the errors that are known."
)
EXIT_USER_ERROR = 2
EXIT_UNKNOWN = 1


def explain(error: Exception) -> int:
    """Print one line for a known error, or that it is not known; the traceback goes to a file. Returns the status."""
    from pronghorn.diagnostics.translate import translate

    if isinstance(error, PronghornError):
        print(f"pronghorn: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    known = translate(error)
    log = _write(error)
    where = f"The traceback is in {log}" if log is not None else "Run it again with --debug for the traceback"
    if known is not None:
        print(f"pronghorn: {known}", file=sys.stderr)
        print(f"{where}; `pronghorn explain {known.code}` says more.", file=sys.stderr)
        return EXIT_USER_ERROR
    print(f"pronghorn: unexpected {type(error).__name__}: {first_line(error)}", file=sys.stderr)
    print(f"{where}. {HOW_TO_REPORT}", file=sys.stderr)
    return EXIT_UNKNOWN


def _write(error: Exception) -> Path | None:
    """The traceback in a file of the system's temporary folder; None where that cannot be written."""
    name = f"pronghorn-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    path = Path(tempfile.gettempdir()) / name
    head = f"pronghorn {__version__}, Python {sys.version.split()[0]}, {' '.join(sys.argv[1:2])}\n\n"
    try:
        path.write_text(head + "".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        return None
    return path
