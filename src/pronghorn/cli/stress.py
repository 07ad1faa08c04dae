"""``pronghorn stress CONFIG.yaml``: how much wrong labels move the held-out score, beside the seeds."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from pronghorn.cli.arguments import add_run_file
from pronghorn.cli.console import say, table
from pronghorn.cli.numbers import positive

#: Steps of each training where neither the file nor the command says.
_STEPS = 60


def register(commands: Any) -> None:
    """Add ``stress`` to the parser's commands."""
    command = commands.add_parser(
        "stress",
        help="train with wrong labels and other seeds: how much does the held-out score move?",
        description="CONFIG.yaml is that of train; its rows that are held back are the score. The base model is loaded "
        "once. A share of the training rows gets the answers of other rows.",
    )
    add_run_file(command)
    command.add_argument(
        "--shares", type=_percents, default=(0.1, 0.2), metavar="P,P", help="wrong answers in percent (10,20)"
    )
    command.add_argument("--seeds", type=positive, default=3, metavar="N", help="runs at each share (3)")
    command.add_argument(
        "--steps", type=positive, metavar="N", help=f"of each run (default: training.max_steps, or {_STEPS})"
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def _percents(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(dict.fromkeys(float(part) / 100 for part in text.split(",") if part.strip()))
    except ValueError:
        shares = ()
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise argparse.ArgumentTypeError("must be percents from 0 to 100, such as 10,20")
    return shares


def run(options: argparse.Namespace) -> int:
    from pronghorn.cli.quiet import quiet_libraries
    from pronghorn.cli.row_files import refuse_no_held_back
    from pronghorn.cli.train import make_trainer, training_settings
    from pronghorn.config import load_config

    config = load_config(options.config, options.overrides)
    refuse_no_held_back(config)
    quiet_libraries()
    steps = options.steps or max(config.training.max_steps or 0, 0) or _STEPS
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, max_steps=steps))
    trainer, _ = make_trainer(config, training_settings(config))
    from pronghorn.experiments.stress import Score, stress

    def tell(score: Score) -> None:
        outcome = f"held-out loss {score.loss:.4f}, accuracy {score.accuracy:.1%}"
        say(f"  {score.share:4.0%} wrong, seed {score.seed}: {outcome}")

    report = stress(
        trainer,
        shares=options.shares,
        seeds=[config.training.seed + at for at in range(options.seeds)],
        on_score=None if options.json else tell,
    )
    if options.json:
        say(json.dumps(report.as_dict()))
        return 0
    table(
        f"{len(report.scores)} runs of {report.steps} steps on {report.rows:,} rows, scored on {report.held_out:,}",
        ("wrong answers", "rows", "held-out loss", "± seeds", "accuracy", "moved by", "± seeds"),
        [
            (
                f"{level.share:.0%}", f"{level.wrong:,}", f"{level.loss:.4f}", f"{level.spread:.4f}",
                f"{level.accuracy:.1%}", f"{level.shift:+.4f}", f"{level.shift_spread:.4f}",
            )
            for level in report.levels
        ],
    )  # fmt: skip
    say()
    for sentence in report.sentences():
        say(sentence)
    return 0
