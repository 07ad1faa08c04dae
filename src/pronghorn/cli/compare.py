"""``pronghorn compare RUN RUN ...``: settings that differ, losses, throughput and memory side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pronghorn.cli.console import say, table
from pronghorn.errors import CommandMisused


def register(commands: Any) -> None:
    """Add ``compare`` to the parser's commands."""
    command = commands.add_parser(
        "compare",
        help="runs side by side: settings that differ, losses, throughput, memory",
        description="RUN is the output folder of any run that Transformers' Trainer made, its run.json or a "
        "trainer_state.json.",
    )
    command.add_argument("runs", nargs="+", metavar="RUN")
    command.add_argument("--html", metavar="PATH", help="write a page with the curves over one another")
    command.add_argument("--json", action="store_true", help="print the comparison as JSON")


def run(options: argparse.Namespace) -> int:
    from pronghorn.experiments.compare_runs import compare, comparison_page
    from pronghorn.pages import visible, write_whole
    from pronghorn.tuning.run_record import load_run

    if len(options.runs) < 2:
        raise CommandMisused("one run alone is not compared", fix="name two runs or more; curves reads one")
    comparison = compare([load_run(place) for place in options.runs], options.runs)
    if options.html:
        try:
            write_whole(comparison_page(comparison), Path(options.html).expanduser())
        except OSError as error:
            raise CommandMisused(
                f"the page '{options.html}' cannot be written: {error.strerror}",
                fix="name another file with --html",
            ) from None
    if options.json:
        say(json.dumps(comparison.as_dict()))
        return 0
    names = [visible(name) for name in comparison.names]
    table(
        "What came of them", ("", *names), [(figure.name, *figure.texts()) for figure in comparison.figures]
    )
    if comparison.settings:
        rows = [
            (visible(name), *(visible(text, 60) for text in texts)) for name, texts in comparison.settings
        ]
        table("Settings that differ", ("setting", *names), rows)
    else:
        say("\nNo settings differ, as far as they are known.")
    for name, texts in zip(names, comparison.findings, strict=True):
        for text in texts:
            say(f"\n{name}: {text}")
    if options.html:
        say(f"\nPage: {options.html}")
    return 0
