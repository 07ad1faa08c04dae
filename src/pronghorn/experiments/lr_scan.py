"""A learning rate by trying some: short trainings from the same start, on the same batches.

The second method beside the range test. It costs as many short trainings as there are candidates and asks the question
itself: after the same number of steps, whose loss is lowest?
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pronghorn.errors import NoRateFound
from pronghorn.training.borrowed import Borrowed, borrow
from pronghorn.tuning.rates import has_diverged

#: Candidates around a rate that is guessed, as factors of it.
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
STEPS = 30
#: Of a candidate's steps, the share at the end whose losses judge it where no rows are held back.
JUDGED = 0.5


@dataclass(frozen=True)
class Candidate:
    """A rate and what it came to: the loss that judges it, how much lower that is than at the start, steps done."""

    rate: float
    loss: float
    change: float
    steps: int
    diverged: bool


@dataclass(frozen=True)
class Scan:
    """All candidates from the lowest rate to the highest.

    Args:
        judged_by: whose loss: "held-back rows", or "the batches of the last steps".
    """

    candidates: tuple[Candidate, ...]
    judged_by: str
    seconds: float

    @property
    def best(self) -> Candidate:
        return min(self.candidates, key=lambda one: one.loss)

    @property
    def at_edge(self) -> bool:
        """Whether the best is the lowest or the highest candidate, so that a better one may lie outside."""
        return self.best in (self.candidates[0], self.candidates[-1])


def scan(trainer: Any, rates: Sequence[float], *, steps: int = STEPS) -> Scan:
    """Train `steps` steps at each rate, falling linearly to zero; put everything back.

    A candidate that diverges is not trained to its end.

    Raises:
        NoRateFound: none made the loss lower.
        TrainerBusy: the trainer is training.
    """
    began = time.perf_counter()
    with borrow(trainer) as lent:
        before = lent.losses(steps)
        lent.rewind()
        held_back = trainer.eval_dataset is not None
        start = lent.held_out_loss() if held_back else _mean_of_last(before)
        found = []
        for rate in sorted(set(rates)):
            found.append(_try(lent, rate, steps, before, start, held_back))
            lent.rewind()
    if all(one.change >= 0 for one in found):
        raise NoRateFound(
            f"none of the rates {', '.join(f'{one.rate:.2g}' for one in found)} made the loss lower",
            fix="check the rows (pronghorn data check) and that something is trained, or try other rates",
        )
    judged_by = "held-back rows" if held_back else "the batches of the last steps"
    return Scan(tuple(found), judged_by, time.perf_counter() - began)


def _try(
    lent: Borrowed, rate: float, steps: int, before: list[float], start: float, held_back: bool
) -> Candidate:
    def diverged(losses: list[float]) -> bool:
        changes = [loss - first for loss, first in zip(losses, before, strict=False)]
        return has_diverged(changes, sum(before) / len(before))

    losses = lent.train(steps, lambda step: rate * (1 - step / steps), diverged)
    if len(losses) < steps or not math.isfinite(losses[-1]):
        return Candidate(rate, math.inf, math.inf, len(losses), True)
    loss = lent.held_out_loss() if held_back else _mean_of_last(losses)
    return Candidate(rate, loss, loss - start, len(losses), False)


def _mean_of_last(losses: Sequence[float]) -> float:
    last = losses[-max(round(JUDGED * len(losses)), 1) :]
    return sum(last) / len(last)
