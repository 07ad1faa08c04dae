"""Printing: rich tables in a terminal, aligned plain text when piped."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from pronghorn.pages import duration as duration


def is_terminal() -> bool:
    return sys.stdout.isatty()


def say(text: str = "") -> None:
    print(text, flush=True)


def heading(text: str) -> None:
    if is_terminal():
        from rich.console import Console

        Console().rule(f"[bold]{text}", align="left")
    else:
        say(f"\n== {text}")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; the last column takes the rest of the line."""
    cells = [[str(cell) for cell in row] for row in rows]
    if is_terminal():
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        shown = Table(title=title, title_justify="left", title_style="bold", show_lines=False)
        for column in columns:
            shown.add_column(column, overflow="fold")
        for row in cells:
            shown.add_row(*map(escape, row))
        Console().print(shown)
        return
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    say(f"\n{title}")
    for row in [list(columns), *cells]:
        say("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def wrapped(text: str, indent: str, width: int = 100) -> str:
    """``text`` in lines of ``width``, each line of it indented."""
    lines = [
        textwrap.fill(line, width, initial_indent=indent, subsequent_indent=indent)
        for line in text.splitlines()
    ]
    return "\n".join(lines)


def typed_command() -> str:
    """What a terminal starts this command by: its path where its environment is not active, and it is not on PATH."""
    beside = Path(sys.executable).with_name("pronghorn")
    if not beside.is_file() or shutil.which("pronghorn") == str(beside):
        return "pronghorn"
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)


def first_line(error: BaseException) -> str:
    """What an exception says in its first line, without a full stop; its type's name when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
