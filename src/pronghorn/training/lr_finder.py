"""The learning rate of a run, found by an exponential range test on its own model, rows and optimizer.

The trainer is borrowed: parameters, optimizer, scheduler, random numbers and the data's order are afterwards what they
were, bit by bit. The test itself and its reading are in `tuning.rates`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pronghorn.errors import NoRateFound, UnknownArgument
from pronghorn.pages import write_whole
from pronghorn.training.borrowed import borrow
from pronghorn.tuning.rate_chart import chart
from pronghorn.tuning.rates import (
    FEWEST_POINTS,
    Choice,
    changes_of,
    choose,
    geometric,
    has_diverged,
    sparkline,
)

logger = logging.getLogger("pronghorn")

#: The test's rates for adapters; for all weights both are a tenth.
LOWEST, HIGHEST = 1e-5, 1.0
STEPS = 100


@dataclass(frozen=True)
class RateTest:
    """A range test: each step's rate, its batch's loss, and the loss of the same batch before the test."""

    rates: list[float]
    losses: list[float]
    before: list[float]
    choice: Choice
    seconds: float

    @property
    def rate(self) -> float:
        return self.choice.rate

    @property
    def changes(self) -> list[float]:
        """What the test has changed of each batch's loss, by `changes_of`."""
        return changes_of(self.losses, self.before)

    def as_dict(self) -> dict[str, Any]:
        found = self.choice
        return {
            "learning_rate": found.rate,
            "reason": found.reason,
            "first": found.first,
            "last": found.last,
            "fall": found.fall,
            "seconds": round(self.seconds, 1),
            "rates": self.rates,
            "losses": _plain(self.losses),
            "losses_before": _plain(self.before),
            "smoothed_changes": list(found.smooth),
        }

    def write(self, folder: str | Path) -> tuple[Path, Path]:
        """Write `lr_finder.json` and `lr_finder.svg`; returns their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        drawing = chart(self.rates, self.changes, self.choice.smooth, self.rate)
        files = {"lr_finder.json": json.dumps(self.as_dict(), indent=1), "lr_finder.svg": drawing}
        for name, text in files.items():
            write_whole(text, folder / name)
        figures, plot = (folder / name for name in files)
        return figures, plot


def _plain(losses: list[float]) -> list[float | None]:
    """JSON has no number for what is none."""
    return [loss if math.isfinite(loss) else None for loss in losses]


def range_test(
    trainer: Any, *, lowest: float | None = None, highest: float | None = None, steps: int = STEPS
) -> RateTest:
    """Train `steps` steps with a rate that grows from `lowest` to `highest`, read the curve, put everything back.

    The rates' defaults are 1e-5 and 1 for adapters, a tenth of it for full fine-tuning. The test ends early where the
    loss goes up for good.

    Raises:
        NoRateFound: the loss fell at no rate.
        TrainerBusy: the trainer is training.
        DatasetUnusable: its rows are a stream.
        UnknownArgument: for rates that do not rise, or too few steps for a curve.
    """
    share = 1.0 if _trains_adapters(trainer.model) else 0.1
    lowest = LOWEST * share if lowest is None else lowest
    highest = HIGHEST * share if highest is None else highest
    if not 0 < lowest < highest < math.inf:
        raise UnknownArgument(
            f"rates cannot rise from {lowest:g} to {highest:g}",
            fix="give a lowest rate above 0 and a higher highest",
        )
    if steps < FEWEST_POINTS:
        raise UnknownArgument(
            f"{steps} steps make no curve", fix=f"test at least {FEWEST_POINTS} steps, better {STEPS}"
        )
    rates = geometric(lowest, highest, steps)
    began = time.perf_counter()
    with borrow(trainer) as lent:
        before = lent.losses(steps)
        lent.rewind()

        def diverged(losses: list[float]) -> bool:
            return has_diverged(changes_of(losses, before), sum(before) / len(before))

        losses = lent.train(steps, rates.__getitem__, diverged)
    done = len(losses)
    before = before[:done]
    choice = choose(rates[:done], changes_of(losses, before))
    if choice is None:
        raise NoRateFound(
            f"at no rate from {rates[0]:.0e} to {rates[done - 1]:.0e} the loss fell",
            fix="check the rows (pronghorn data check) and that something is trained, or test other rates",
        )
    return RateTest(rates[:done], losses, before, choice, time.perf_counter() - began)


def get_best_learning_rate(trainer: Any, **options: Any) -> float:
    """The learning rate that a range test advises for this run, by `range_test`, whose options it takes.

    Nothing of the run is changed. The test is left in `output_dir` as lr_finder.json and lr_finder.svg.
    """
    found = range_test(trainer, **options)
    plot = found.write(trainer.args.output_dir)[1]
    logger.warning(
        "pronghorn: learning rate %.2g, %s (%s); see %s",
        found.rate, found.choice.reason, sparkline(found.choice.smooth, 40), plot,
    )  # fmt: skip
    return found.rate


def _trains_adapters(model: Any) -> bool:
    """Whether most weights are frozen."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained < 0.5 * sum(p.numel() for p in model.parameters())
