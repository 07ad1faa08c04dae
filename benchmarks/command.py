"""What commands that measure in processes of their own have in common: arguments, a shallower model, outcomes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from benchmarks.registry import Workload, find_workload
from benchmarks.run import failure_reason, results_in


def parser_of(name: str, text: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_process_arguments(parser: argparse.ArgumentParser, timeout: float, of: str) -> None:
    """`--layers`, `--timeout`, `--checkpoints`, `--logs` and `--json`; and a process's own `--checkpoint`.

    Args:
        timeout: seconds by default, for one `of`.
    """
    parser.add_argument("--layers", type=int, help="of a shallower model (default: as many as it has)")
    parser.add_argument("--timeout", type=float, default=timeout, help=f"seconds for one {of}")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        help="kept between runs, on a disk where the page cache counts (default: temporary)",
    )
    parser.add_argument("--logs", type=Path, help="folder for each process's whole output")
    parser.add_argument("--json", action="store_true", help="print each row as a JSON line, too")
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)


def settle(options: argparse.Namespace) -> None:
    """Paths that hold in any folder, and libraries that ask no hub."""
    for name in ("checkpoints", "logs"):
        given = getattr(options, name)
        setattr(options, name, None if given is None else given.absolute())
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def workload_of(name: str, layers: int | None) -> Workload:
    """A workload by its name, of a model with so many layers; None: as many as it has."""
    return find_workload(f"{name}@{layers}layers" if layers else name)


def outcome(status: int, output: str, timeout: float) -> dict[str, Any]:
    """The last result that a process printed, or its `error`."""
    found = results_in(output)
    return found[-1] if found else {"error": failure_reason(status, output, timeout)}
