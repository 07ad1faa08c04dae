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

# Escape sequences other than colours: \x1b[2K erases a line, \x1b[1A goes up one; the rest moves nothing here.
CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-KSTfhlsu])|\x1b\][^\x07]*\x07|\r|\n")


def last_state(recording: str) -> list[str]:
    """The lines as they stand at the end, when everything that was drawn over is gone."""
    lines, row, restart, position = [""], 0, False, 0
    for control in [*CONTROL.finditer(recording), None]:
        text = recording[position : control.start() if control else None]
        if text:
            lines[row] = text if restart else lines[row] + text
            restart = False
        if control is None:
            break
        position = control.end()
        if control[0] == "\r":
            restart = True
        elif control[0] == "\n":
            row, restart = row + 1, False
            lines += [""] * (row + 1 - len(lines))
        elif control[2] == "A":
            row = max(0, row - int(control[1] or 1))
        elif control[2] == "K" and control[1] == "2":
            lines[row] = ""
    return [line.rstrip() for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recording", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--title", default="pronghorn")
    parser.add_argument("--width", type=int, default=110)
    parser.add_argument("--skip", default=r"^Script (started|done)", help="lines that match are left out")
    options = parser.parse_args()
    console = Console(record=True, width=options.width, file=io.StringIO(), force_terminal=True)
    for line in last_state(options.recording.read_bytes().decode(errors="replace")):
        if not re.search(options.skip, line):
            console.print(Text.from_ansi(line), soft_wrap=False)
    console.save_svg(str(options.picture), title=options.title)


if __name__ == "__main__":
    main()
