"""``pronghorn quantise MODEL --output FOLDER``: 4 bits where they do little harm, as a stock checkpoint."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from pronghorn.cli.arguments import add_model
from pronghorn.cli.console import duration, say, table
from pronghorn.errors import ExportDiffers

#: modules that the table shows unless all are asked for
_SHOWN = 20


def register(commands: Any) -> None:
    """Add ``quantise`` to the parser's commands."""
    parser = commands.add_parser(
        "quantise",
        help="measure what 4 bits do to each layer, and write a 4-bit checkpoint that is fitted to that",
        description="The layers that bear 4 bits least stay in 16, as far as the budget goes; the others are rounded "
        "so that their outputs change little. The folder is loaded by stock Transformers with bitsandbytes, which is "
        "tried; where that predicts something else, the exit status is 2.",
    )
    add_model(parser)
    parser.add_argument("--output", required=True, metavar="FOLDER")
    parser.add_argument(
        "--data",
        default="docstrings",
        metavar="FILE",
        help="rows to measure on, best of the kind that the model will be trained on (default: the docstrings of "
        "Python's library)",
    )
    parser.add_argument(
        "--budget",
        metavar="EXTRA",
        help="bytes beyond 4 bits with double quantisation everywhere: a share, a size or 0 (default: 9%%, which is "
        "what plain NF4 takes)",
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens to measure on (default: 8192)")
    parser.add_argument("--all", action="store_true", help=f"show all modules, not the {_SHOWN} worst")
    parser.add_argument("--no-check", action="store_true", help="do not load what was written")
    parser.add_argument("--json", action="store_true", help="print one line of JSON in place of the table")


def run(options: argparse.Namespace) -> int:
    """Measure, write, check; 0 when stock Transformers loads what was made."""
    from pronghorn.cli.models import config_of, resolve_model
    from pronghorn.cli.quiet import quiet_libraries

    quiet_libraries()
    from pronghorn.export import save_quantised
    from pronghorn.loading import FastLanguageModel
    from pronghorn.loading.dynamic import check_folder_holds
    from pronghorn.quantising.settings import DynamicQuantisation

    started = time.monotonic()
    given = {"extra": options.budget, "tokens": options.tokens, "calibration": options.data}
    settings = DynamicQuantisation(**{name: value for name, value in given.items() if value is not None})
    name = resolve_model(options.model)
    check_folder_holds(config_of(name))
    model, tokenizer = FastLanguageModel.from_pretrained(
        name, max_seq_length=None, load_in_4bit=True, dynamic_4bit=settings
    )
    report = model.pronghorn_quantisation
    made_of = {"original": model.pronghorn_source.name, "calibration": options.data, "extra": settings.extra}
    failure = None
    try:
        done = save_quantised(
            model, tokenizer, options.output, made_of | report.as_dict(), verify=not options.no_check
        )
    except ExportDiffers as error:
        failure, done = error, error.export
    if options.json:
        checks = [
            {"name": found.name, "passed": found.passed, "problems": found.problems} for found in done.checks
        ]
        say(json.dumps({"folder": str(done), "checks": checks} | made_of | report.as_dict()))
    else:
        _show(report, options.all)
        for found in done.checks:
            say(f"  {found}")
        say(f"{done}: done in {duration(time.monotonic() - started)}")
    if failure is not None:
        raise failure
    return 0


def _show(report: Any, every: bool) -> None:
    from pronghorn.quantising.report import HEADER

    rows = [module.cells() for module in report.worst_first()]
    shown = rows if every else rows[:_SHOWN]
    table(f"Linear layers, worst first ({len(shown)} of {len(rows)})", HEADER, shown)
    say(f"\n{report}")
