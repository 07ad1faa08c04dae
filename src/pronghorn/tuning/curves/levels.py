"""A loss that rises and stays up, and losses and gradients that are no numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pronghorn.tuning.curves.finding import Finding
from pronghorn.tuning.curves.history import Curve, History
from pronghorn.tuning.curves.robust import MEDIAN_ERROR, logarithms, noise, running_median

#: A smoothed loss is the median of a fifteenth of the points, of at least 5 and at most 64.
_WINDOW_SHARE, _WINDOW_LEAST, _WINDOW_MOST = 15, 5, 64
#: Rises of a smoothed loss worth a word: a quarter, and ten of its standard errors, since the widest span of a smoothed
#: curve of nothing but noise is six or seven of them.
_RISE, _ERRORS = math.log(1.25), 10.0
#: The first steps against the very first one, which no update has touched: a single step's noise counts in full.
_FIRST_RISE, _FIRST_SIGMAS, _FIRST_STEPS = math.log(1.3), 6.0, 5
_LEAST_POINTS = 8
#: Above what training began with: 5 %, and two standard errors of that.
_ABOVE, _ABOVE_ERRORS = math.log(1.05), 2.0
#: Nats: near a loss of zero, shares mean nothing.
_LEAST_RISE = 0.1
#: An overflow now and then belongs to float16's loss scaling, which begins with some.
_OVERFLOWS, _SCALING_BEGINS = 0.05, 20


@dataclass(frozen=True)
class _Rise:
    """Steps and losses of the lowest level, of the highest after it, and of the end."""

    low_step: int
    low: float
    high_step: int
    high: float
    end: float

    @property
    def over(self) -> bool:
        """Whether at least half of it was made good again."""
        return math.log(self.end) < (math.log(self.low) + math.log(self.high)) / 2


def rises(history: History) -> list[Finding]:
    """`rate-too-large`, `divergence` or `setback`: at most one, of the highest rise there was."""
    curve = history.loss.finite
    if len(curve) < _LEAST_POINTS:
        return []
    logs = logarithms(curve.values)
    rise = _at_the_start(curve, logs) or _later(curve, logs)
    if rise is None:
        return []
    told = f"from {rise.low:.4g} at step {rise.low_step} to {rise.high:.4g} at step {rise.high_step}"
    rate = _rate(history, rise)
    start, of = (rise.low, 1) if rise.low_step == curve.steps[0] else (float(np.median(curve.values[:3])), 3)
    above = start * math.exp(max(_ABOVE, _ABOVE_ERRORS * noise(logs) / math.sqrt(of)))
    if rise.over and rise.end <= above:
        what = f"The loss rose {told} and is back at {rise.end:.4g}."
        advice = (
            f"Steps were lost to it: lower learning_rate{rate} or raise warmup_steps, and keep max_grad_norm at 1; "
            "where that is an ordinary rate, shuffle rows that come in blocks of one kind."
        )
        return [Finding("setback", rise.low_step, rise.high_step, what, advice, lasting=False)]
    if max(rise.high, rise.end) > above:
        return [
            Finding(
                "rate-too-large",
                rise.low_step,
                history.last_step,
                f"The loss rose {told}, above the {start:.4g} that training began with, and is {rise.end:.4g} now.",
                f"Begin again with a tenth of the learning_rate{rate}, and with warmup_steps.",
            )
        ]
    return [
        Finding(
            "divergence",
            rise.low_step,
            history.last_step,
            f"The loss rose {told} and is {rise.end:.4g} now.",
            f"Go back to a checkpoint of about step {rise.low_step}, with a third of the learning_rate{rate}; where "
            "that is an ordinary rate, look at the rows trained on since then.",
        )
    ]


def _at_the_start(curve: Curve, logs: np.ndarray) -> _Rise | None:
    """Whether the first updates made it worse."""
    after = logs[1 : 1 + _FIRST_STEPS]
    level = float(np.median(after))
    if level - logs[0] <= max(_FIRST_RISE, _FIRST_SIGMAS * noise(logs)):
        return None
    if math.exp(level) - curve.values[0] <= _LEAST_RISE:
        return None
    # The highest level is what it came to in the first tenth.
    width = min(_FIRST_STEPS, len(logs) - 1)
    early = running_median(logs[1 : max(len(logs) // 10, 2 * width) + 1], width)
    top = int(np.argmax(early))
    return _Rise(
        int(curve.steps[0]),
        float(curve.values[0]),
        int(curve.steps[1 + top + width // 2]),
        math.exp(float(early[top])),
        math.exp(float(np.median(logs[-width:]))),
    )


def _later(curve: Curve, logs: np.ndarray) -> _Rise | None:
    """The highest rise of the smoothed loss over what it had come down to."""
    width = int(np.clip(len(logs) // _WINDOW_SHARE, _WINDOW_LEAST, _WINDOW_MOST))
    smooth = running_median(logs, width)
    lowest = np.minimum.accumulate(smooth)
    above = np.where(np.exp(smooth) - np.exp(lowest) > _LEAST_RISE, smooth - lowest, 0.0)
    top = int(np.argmax(above))
    error = MEDIAN_ERROR * noise(logs) / math.sqrt(width)
    if above[top] <= max(_RISE, _ERRORS * error):
        return None
    # Where it left the bottom, not the lowest point of a long flat one.
    bottom = int(np.flatnonzero(smooth[: top + 1] <= smooth[: top + 1].min() + 2 * error)[-1])
    return _Rise(
        int(curve.steps[bottom + width // 2]),
        math.exp(float(smooth[bottom])),
        int(curve.steps[top + width // 2]),
        math.exp(float(smooth[top])),
        math.exp(float(smooth[-1])),
    )


def _rate(history: History, rise: _Rise) -> str:
    rate = history.rate.between(rise.low_step, rise.high_step).values
    at = float(rate.max()) if len(rate) else history.rate.at(rise.high_step)
    return f" ({at:.2g} there)" if math.isfinite(at) else ""


def not_numbers(history: History) -> list[Finding]:
    """Losses that are NaN or infinite; gradients, where they are more than loss scaling's overflows."""
    found: list[Finding] = []
    for name, curve in (("loss", history.loss), ("gradient norm", history.grad_norm)):
        bad = ~np.isfinite(curve.values)
        if not bad.any():
            continue
        late = bad & (curve.steps > _SCALING_BEGINS)
        if name == "gradient norm" and (found or late.mean() < _OVERFLOWS or late.sum() < 3):
            continue
        first, last = (int(curve.steps[at]) for at in np.flatnonzero(bad)[[0, -1]])
        count = int(bad.sum())
        lasting = bool(bad[-3:].all())
        which = f"step {first}" if count == 1 else f"{count} steps, from step {first} to {last}"
        what = f"The {name} is no number in {which}" + (", the last one." if lasting and count > 1 else ".")
        advice = (
            "The warning of that step names the tensor, layer, row and token it began at. Lower learning_rate or raise "
            "warmup_steps; load a float16 model as bfloat16; look at the row."
        )
        rows = tuple(history.rows.get(first, ()))
        found.append(Finding("not-a-number", first, last, what, advice, rows, lasting=lasting))
    return found
