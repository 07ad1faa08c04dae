"""``pronghorn curves RUN``: what the curves of a run say, in sentences."""

from __future__ import annotations

import argparse
import json
from typing import Any

from pronghorn.cli.console import say


def register(commands: Any) -> None:
    """Add ``curves`` to the parser's commands."""
    command = commands.add_parser(
        "curves",
        help="what a run's curves say: overfitting, divergence, spikes and their rows, ...",
        description="RUN is the output folder of any run that Transformers' Trainer made, its run.json or a "
        "trainer_state.json.",
    )
    command.add_argument("run", metavar="RUN")
    command.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(options: argparse.Namespace) -> int:
    from pronghorn.pages import visible
    from pronghorn.tuning.curves import History, read_curves
    from pronghorn.tuning.run_record import load_run

    record = load_run(options.run)
    history = History.of_record(record)
    found = read_curves(history)
    if options.json:
        say(
            json.dumps(
                {"run": record.name, "steps": history.last_step, "findings": [f.as_dict() for f in found]}
            )
        )
        return 0
    evaluations = max((len(curve) for curve in history.evaluations.values()), default=0)
    say(
        f"{visible(record.name)}: {history.last_step:,} steps, {len(history.loss):,} losses, "
        f"{len(history.grad_norm):,} gradient norms, {evaluations:,} evaluations"
    )
    advised: set[str] = set()
    for finding in found:
        steps = (
            f"step {finding.first}"
            if finding.first == finding.last
            else f"steps {finding.first} to {finding.last}"
        )
        say(f"\n{finding.level}: {finding.kind}, {steps}\n  {finding.what}")
        if finding.advice not in advised:
            say(f"  {finding.advice}")
            advised.add(finding.advice)
    if not found:
        say("Nothing is wrong that a curve would show.")
    return 0
