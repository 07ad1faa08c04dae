"""A loss that does not fall: never, no longer, or in swings."""

from __future__ import annotations

import math

import numpy as np

from pronghorn.tuning.curves.evaluation import in_words
from pronghorn.tuning.curves.finding import Finding
from pronghorn.tuning.curves.history import Curve, History
from pronghorn.tuning.curves.robust import MEDIAN_ERROR, logarithms, noise, period, total_change

#: A plateau is proven, not supposed: with 97.5 % certainty the loss fell by less than this over half of the run.
_FLAT = 0.02
_PLATEAU_POINTS, _PLATEAU_SHARES = 60, (0.25, 1 / 3, 0.5)
#: What the loss has fallen by before a plateau is one, and what a run falls by that is none of a rate too small.
_FELL, _HARDLY = 0.05, 0.03
_STILL_POINTS = 30
#: Evaluations are of the same rows every time: four that all lie within 1 % prove what noisier batches cannot, if these
#: show that no more than a tenth was learned before the first of them.
_EVALUATED, _EVALUATIONS_STAY, _LEARNED_BEFORE = 4, 0.01, 0.1
#: Swings of ±3 % of the loss, over the last points.
_SWING, _SWING_POINTS, _SWING_LEAST = 0.03, 256, 48


def trend_findings(history: History) -> list[Finding]:
    """`rate-too-small` or `plateau`, and `oscillation`."""
    curve = history.loss.finite
    return [*(_too_small(history, curve) or _plateau(history, curve)), *_oscillation(history, curve)]


def _too_small(history: History, curve: Curve) -> list[Finding]:
    if len(curve) < _STILL_POINTS or not _rate_was_reached(history, curve):
        return []
    if _evaluation_falls(history, 0, _HARDLY):
        return []
    logs = logarithms(curve.values)
    change, error = total_change(logs)
    sigma = noise(logs)
    first, rest = logs[: max(5, len(logs) // 20)], logs[len(logs) // 2 :]
    begins, ends = float(np.median(first)), float(np.median(rest))
    at_first = MEDIAN_ERROR * sigma / math.sqrt(len(first))
    at_rest = MEDIAN_ERROR * sigma / math.sqrt(len(rest))
    if change > _FELL or begins - ends > _HARDLY + 2 * at_first or logs[0] - ends > 0.1 + 4 * sigma:
        return []
    stays = _evaluations_stay(history)
    little_before = begins - ends + 2 * math.hypot(at_first, at_rest) < _LEARNED_BEFORE
    if -change + 2 * error > _HARDLY and not (stays and little_before):
        return []
    low, high = math.exp(begins), math.exp(ends)
    told = stays or f"The loss went from {low:.4g} to {high:.4g} in {curve.steps[-1]} steps"
    rate = f" at rates of at most {history.rate.values.max():.2g}" if len(history.rate) else ""
    return [
        Finding(
            "rate-too-small",
            int(curve.steps[0]),
            int(curve.steps[-1]),
            f"{told}{rate}: it hardly moves.",
            "Raise learning_rate tenfold. A loss that stays even then has nothing to learn: the model knows such rows, "
            "or too few of their tokens are trained on.",
        )
    ]


def _evaluations_stay(history: History) -> str:
    """That the losses on held-out rows stay where they are, over most of the steps so far; "" where they do not."""
    told = ""
    for name, curve in history.evaluations.items():
        steps, values = curve.finite.steps, curve.finite.values
        if len(values) < _EVALUATED or steps[-1] - steps[0] < history.last_step / 2:
            return ""
        if values.max() > (1 + _EVALUATIONS_STAY) * values.min():
            return ""
        told = told or (
            f"The {in_words(name)} went from {values[0]:.4g} at step {steps[0]} to {values[-1]:.4g} at step {steps[-1]}"
        )
    return told


def _rate_was_reached(history: History, curve: Curve) -> bool:
    """Whether most of the steps were made at a rate worth the name, not on the way up to it."""
    rates = [history.rate.at(step) for step in curve.steps[:: max(len(curve) // 50, 1)]]
    known = [rate for rate in rates if math.isfinite(rate)]
    return not known or float(np.mean(np.array(known) >= 0.4 * max(known))) >= 0.4


def _plateau(history: History, curve: Curve) -> list[Finding]:
    count = len(curve)
    if count < _PLATEAU_POINTS or (not history.over and history.last_step < history.max_steps / 2):
        return []
    logs = logarithms(curve.values)
    for share in _PLATEAU_SHARES:
        part = logs[int(count * share) :]
        change, error = total_change(part)
        fallen = float(np.median(logs[: max(count // 20, 3)])) - float(np.median(part))
        if -change + 2 * error < _FLAT and change < _FELL and fallen > _FELL:
            first = int(curve.steps[int(count * share)])
            if _rate_has_gone(history, first) or _evaluation_falls(history, first, _EVALUATIONS_STAY):
                return []
            level = float(np.median(curve.values[int(count * share) :]))
            return [
                Finding(
                    "plateau",
                    first,
                    int(curve.steps[-1]),
                    f"The loss has stayed at {level:.4g} since step {first}, {1 - share:.0%} of the steps so far.",
                    "Fewer steps would have done. For a lower loss: a higher learning_rate or rank, more "
                    "target_modules, or more varied rows.",
                )
            ]
    return []


def _rate_has_gone(history: History, step: int) -> bool:
    """Whether the schedule had already lowered the rate by half: a flat end is what it is for."""
    return len(history.rate) > 0 and history.rate.at(step) < 0.5 * float(history.rate.values.max())


def _evaluation_falls(history: History, step: int, share: float) -> bool:
    """Whether a loss on held-out rows has fallen by more than this since the step."""
    for curve in history.evaluations.values():
        late = curve.finite.between(step, math.inf).values
        if len(late) >= 2 and late[-1] < (1 - share) * late[0]:
            return True
    return False


def _oscillation(history: History, curve: Curve) -> list[Finding]:
    late = Curve(
        curve.steps[len(curve) // 10 :][-_SWING_POINTS:], curve.values[len(curve) // 10 :][-_SWING_POINTS:]
    )
    if len(late) < _SWING_LEAST:
        return []
    found = period(logarithms(late.values))
    if found is None or found[1] < _SWING:
        return []
    length = found[0] * float(np.median(np.diff(late.steps)))
    epochs = length / history.steps_per_epoch if history.steps_per_epoch else 0.0
    # Rows in the same order in every epoch make such a curve with any rate, and so do rows learned by heart.
    if epochs > 0.9 and abs(epochs - round(epochs)) < 0.1:
        return []
    level = float(np.median(late.values))
    return [
        Finding(
            "oscillation",
            int(late.steps[0]),
            int(late.steps[-1]),
            f"The loss swings by ±{found[1]:.0%} around {level:.4g}, once in about {length:.0f} steps.",
            "Lower learning_rate or raise the batch (gradient_accumulation_steps); shuffle rows that come in blocks of "
            "one kind.",
        )
    ]
