"""The learning rate that a range test's curve advises.

A range test trains with a rate that grows by a constant factor from step to step. What it shows is the change of each
batch's loss as a share of the loss of the same batch before the test, so that batches of different difficulty do not
matter: nothing at first, then a fall that gets steeper as the rate grows, then a rise where the rate is too high.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: A point is averaged with those of its neighbourhood: width of the Gaussian in powers of e of the rate, six steps of a
#: test of 100. At half of it the lowest point of nine tests on a 135M model lay wherever a few batches put it.
WIDTH = 0.7
#: The test ends when the smoothed change is above its lowest by this share of the loss, or is no number.
DIVERGED = 0.25
#: Steps that are averaged for that.
RECENT = 3
#: Points that a curve must have to be read.
FEWEST_POINTS = 2 * RECENT
#: Rates whose smoothed change reaches this share of the fall are as good as the lowest.
AS_GOOD = 0.9
#: A fall that is smaller than this many standard errors of the curve's noise is none.
CERTAIN = 3.0


@dataclass(frozen=True)
class Choice:
    """A rate, and where it comes from.

    Args:
        first, last: the ends of the curve's flat bottom.
        fall: how much lower the smoothed change is at its lowest than before the test.
        smooth: the smoothed change at every rate of the test.
    """

    rate: float
    first: float
    last: float
    fall: float
    smooth: tuple[float, ...]
    reason: str


def geometric(lowest: float, highest: float, count: int) -> list[float]:
    """`count` rates from the lowest to the highest, each larger than the one before by the same factor."""
    factor = (highest / lowest) ** (1 / max(count - 1, 1))
    return [lowest * factor**index for index in range(count)]


def changes_of(losses: Sequence[float], before: Sequence[float]) -> list[float]:
    """How each batch's loss has changed, in nats of an average batch:  (loss / before - 1) · mean(before)."""
    mean = sum(before) / len(before)
    return [(loss / max(first, 1e-6) - 1) * mean for loss, first in zip(losses, before, strict=False)]


def smoothed(rates: Sequence[float], values: Sequence[float], width: float = WIDTH) -> list[float]:
    """Gaussian averages over neighbouring rates, whose distance is measured in powers of e."""
    logs = [math.log(rate) for rate in rates]
    averages = []
    for at in logs:
        weights = [math.exp(-0.5 * ((log - at) / width) ** 2) for log in logs]
        averages.append(sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights))
    return averages


def has_diverged(changes: Sequence[float], loss: float) -> bool:
    """Whether a test need not go on: the last changes are far above the lowest of them. `loss` is that before it."""
    if changes and not math.isfinite(changes[-1]):
        return True
    means = [sum(changes[i - RECENT : i]) / RECENT for i in range(RECENT, len(changes) + 1)]
    return bool(means) and means[-1] > min(0.0, *means) + DIVERGED * loss


def choose(rates: Sequence[float], changes: Sequence[float]) -> Choice | None:
    """The advised rate of a test, or None where the loss never fell for certain.

    It is the geometric middle of the curve's flat bottom: of the rates around the lowest point at which the smoothed
    change reaches nine tenths of the fall. Below it the loss was still falling as fast as the rate let it, above it
    steps undo what others did. (The steepest point, which others take, lies where most steps were still to come: on the
    model and rows of docs/tuning.md it is a factor of ten too low.)
    """
    known = [(rate, change) for rate, change in zip(rates, changes, strict=True) if math.isfinite(change)]
    if len(known) < FEWEST_POINTS:
        return None
    rates, changes = [rate for rate, _ in known], [change for _, change in known]
    smooth = smoothed(rates, changes)
    bottom = min(range(len(smooth)), key=smooth.__getitem__)
    fall = -smooth[bottom]
    if fall <= CERTAIN * _noise(changes, smooth):
        return None
    first = last = bottom
    while first > 0 and smooth[first - 1] <= -AS_GOOD * fall:
        first -= 1
    while last < len(smooth) - 1 and smooth[last + 1] <= -AS_GOOD * fall:
        last += 1
    return Choice(
        rate=float(f"{math.sqrt(rates[first] * rates[last]):.2g}"),
        first=rates[first],
        last=rates[last],
        fall=fall,
        smooth=tuple(smooth),
        reason=f"the loss fell most from {rates[first]:.1e} to {rates[last]:.1e}",
    )


def _noise(changes: Sequence[float], smooth: Sequence[float]) -> float:
    """Standard error of a smoothed point, from what the first half of the points differ from it."""
    half = max(len(changes) // 2, 2)
    squares = [(change - mean) ** 2 for change, mean in zip(changes[:half], smooth[:half], strict=True)]
    return math.sqrt(sum(squares) / half) / math.sqrt(RECENT)


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """A curve in one line of text; values that are no numbers are gaps."""
    bars = "▁▂▃▄▅▆▇█"
    step = max(len(values) / width, 1.0)
    picked = [
        values[int(i * step)] for i in range(math.ceil(len(values) / step)) if int(i * step) < len(values)
    ]
    finite = [value for value in picked if math.isfinite(value)]
    if not finite:
        return ""
    low, spread = min(finite), max(finite) - min(finite) or 1.0
    return "".join(
        bars[round((value - low) / spread * (len(bars) - 1))] if math.isfinite(value) else " "
        for value in picked
    )
