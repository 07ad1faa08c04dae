"""``pronghorn lr-find config.yaml``: the learning rate for a run, tested on its own model and rows."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pronghorn.cli.arguments import add_run_file
from pronghorn.cli.console import duration, say, table
from pronghorn.cli.numbers import positive

if TYPE_CHECKING:
    from pronghorn.experiments.lr_scan import Scan
    from pronghorn.training.lr_finder import RateTest


def register(commands: Any) -> None:
    """Add ``lr-find`` to the parser's commands."""
    command = commands.add_parser(
        "lr-find",
        help="find the learning rate for a run by a short test on its model and rows",
        description="Takes the file of `pronghorn train`. Nothing is trained for good: the adapter is put back.",
    )
    add_run_file(command)
    command.add_argument(
        "--steps", type=positive, default=100, metavar="N", help="of the range test (default 100)"
    )
    command.add_argument("--lowest", type=float, metavar="RATE", help="default 1e-5; without an adapter 1e-6")
    command.add_argument("--highest", type=float, metavar="RATE", help="default 1; without an adapter 0.1")
    command.add_argument(
        "--scan",
        type=positive,
        metavar="N",
        help="then train N steps at five rates around the advised one, and take the best of them",
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> int:
    """Test, and print the rate; the curve is left in the run's folder as JSON and SVG."""
    from pronghorn.cli.quiet import quiet_libraries

    quiet_libraries()
    from pronghorn.training.lr_finder import range_test

    trainer = _trainer(options)
    found = range_test(trainer, lowest=options.lowest, highest=options.highest, steps=options.steps)
    paths = found.write(trainer.args.output_dir)
    scanned = _scan(trainer, found, options.scan) if options.scan else None
    rate = scanned.best.rate if scanned is not None else found.rate
    if options.json:
        say(json.dumps(_as_dict(rate, found, scanned, paths)))
    else:
        _show(rate, found, scanned, paths)
    return 0


def _trainer(options: argparse.Namespace) -> Any:
    """The trainer that `pronghorn train` would train with."""
    from pronghorn.cli.folders import output_folder
    from pronghorn.cli.train import make_trainer, training_settings
    from pronghorn.config import load_config

    config = load_config(options.config, options.overrides)
    settings = training_settings(config)
    output_folder(settings.output_dir, "output.folder")
    return make_trainer(config, settings)[0]


def _scan(trainer: Any, found: RateTest, steps: int) -> Scan:
    from pronghorn.experiments.lr_scan import FACTORS, scan

    return scan(trainer, [float(f"{found.rate * factor:.2g}") for factor in FACTORS], steps=steps)


def _show(rate: float, found: RateTest, scanned: Scan | None, paths: tuple[Path, Path]) -> None:
    from pronghorn.tuning.rates import sparkline

    choice = found.choice
    say(f"change of the loss, {found.rates[0]:.0e} to {found.rates[-1]:.0e}:  {sparkline(choice.smooth)}")
    rows = [
        ("range test", f"{found.rate:.2g}: {choice.reason}, by {choice.fall:.2f} nats"),
        ("steps", f"{len(found.rates)} in {duration(found.seconds)}"),
        ("plot", str(paths[1])),
        ("figures", str(paths[0])),
    ]
    if scanned is not None:
        table(
            f"Scan, judged by the loss of {scanned.judged_by}",
            ("rate", "loss", "change", ""),
            [
                (
                    f"{one.rate:.2g}",
                    "diverged" if one.diverged else f"{one.loss:.4f}",
                    "" if one.diverged else f"{one.change:+.4f}",
                    "best" if one is scanned.best else "",
                )
                for one in scanned.candidates
            ],
        )
        if scanned.at_edge:
            say("the best is at the edge: a better one may lie beyond it")
    table("Learning rate", ("what", "value"), rows)
    say(f"\ntraining:\n  learning_rate: {rate:.2g}")


def _as_dict(rate: float, found: RateTest, scanned: Scan | None, paths: tuple[Path, Path]) -> dict[str, Any]:
    result: dict[str, Any] = {
        "learning_rate": rate,
        "range_test": found.as_dict(),
        "files": [str(p) for p in paths],
    }
    if scanned is not None:
        result["scan"] = {
            "judged_by": scanned.judged_by,
            "at_edge": scanned.at_edge,
            "candidates": [
                {
                    "rate": one.rate,
                    "loss": one.loss if math.isfinite(one.loss) else None,
                    "diverged": one.diverged,
                }
                for one in scanned.candidates
            ],
        }
    return result
