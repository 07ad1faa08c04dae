"""The loss on held-out rows: whether it has turned."""

from __future__ import annotations

import numpy as np

from pronghorn.tuning.curves.finding import Finding
from pronghorn.tuning.curves.history import Curve, History
from pronghorn.tuning.curves.robust import spread

#: Evaluations are of the same rows every time, so that they vary little by themselves: the last two of them 3 % above
#: the lowest, or the last three 1 %, are no chance. Where they vary more (told by their second differences), three
#: standard deviations.
_RISES = ((2, 0.03), (3, 0.01))
_SIGMAS, _TELLING = 3.0, 6
#: Nats: near a loss of zero, shares mean nothing.
_LEAST_RISE = 0.005
#: A training loss that is this much higher is not learned by heart: something else is wrong.
_TRAINING_ROSE = 1.05


def overfitting(history: History) -> list[Finding]:
    found = []
    for name, curve in history.evaluations.items():
        finding = _turned(history, name, curve.finite)
        if finding is not None:
            found.append(finding)
    return found


def _turned(history: History, name: str, curve: Curve) -> Finding | None:
    values = curve.values
    if len(values) < 3:
        return None
    best = int(np.argmin(values))
    lowest, last = float(values[best]), float(values[-1])
    varies = spread(np.diff(values, 2)) / np.sqrt(6) if len(values) >= _TELLING else 0.0
    least = max(_SIGMAS * varies, _LEAST_RISE)
    if not any(
        len(values) - best > count and min(values[-count:]) >= lowest + max(rise * lowest, least)
        for count, rise in _RISES
    ):
        return None
    first, end = int(curve.steps[best]), int(curve.steps[-1])
    before, after = _training_at(history, first), _training_at(history, end)
    if before and after and after > _TRAINING_ROSE * before:
        return None
    falls = f", while the training loss went from {before:.4g} to {after:.4g}" if before and after else ""
    return Finding(
        "overfitting",
        first,
        end,
        f"The {in_words(name)} rose from {lowest:.4g} at step {first} to {last:.4g} at step {end}{falls}: it learns "
        "its rows by heart.",
        f"The weights of step {first} are the best; stop_early=True ends a run at this point and loads them. Train for "
        "fewer epochs, or give more rows.",
        best_step=first,
    )


def in_words(name: str) -> str:
    """A key of the log that is a loss on held-out rows."""
    return "evaluation loss" if name == "eval_loss" else name.replace("_", " ")


def _training_at(history: History, step: int) -> float:
    """The training loss around a step, the median of a tenth of the run before it; 0 where there is none."""
    width = max(history.last_step // 10, 5, 2 * history.averaged)
    values = history.loss.finite.between(step - width, step).values
    return float(np.median(values)) if len(values) else 0.0
