"""A terminal recording as a picture: ``script -qc 'make quickstart' run.ansi``, then this, writes the svg.

    python scripts/picture.py run.ansi docs/images/quickstart.svg --title "make quickstart"

Lines that were drawn over (progress bars) are left out: of each line only what stood there last is shown.
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

CURSOR_MOVES = re.compile(r"\x1b\[[0-9;?]*[A-KSTfhlsu]")


def last_state(recording: str) -> list[str]:
    """The lines as they stood at the end."""
    lines = []
    for line in recording.replace("\r\n", "\n").split("\n"):
        shown = line.split("\r")[-1]
        lines.append(CURSOR_MOVES.sub("", shown).rstrip())
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--title", default="pronghorn")
    parser.add_argument("--width", type=int, default=110)
    parser.add_argument("--skip", default=r"^Script (started|done)", help="lines that match are left out")
    options = parser.parse_args()
    console = Console(record=True, width=options.width, file=io.StringIO(), force_terminal=True)
    for line in last_state(options.recording.read_text(encoding="utf-8", errors="replace")):
        if not re.search(options.skip, line):
            console.print(Text.from_ansi(line), soft_wrap=False)
    console.save_svg(str(options.picture), title=options.title)


if __name__ == "__main__":
    main()
