"""What gradient norms say beside single jumps: none at all, growth, and clipping that never ends."""

from __future__ import annotations

import math

import numpy as np

from pronghorn.tuning.curves.finding import Finding
from pronghorn.tuning.curves.history import History
from pronghorn.tuning.curves.robust import logarithms, total_change

_LEAST_POINTS = 40
#: A loss's gradient shrinks as the loss does; ten times as much without a lower loss comes before divergence.
_GROWTH, _FALLS = math.log(10.0), 0.03
#: Over ten times the limit in nine steps of ten, a step's length is the limit's and no longer the gradient's.
_CLIPPED, _CLIPPED_SHARE = 10.0, 0.9
#: Steps without any gradient: one may be a batch whose answers were cut off.
_ZEROS = 3


def gradient_findings(history: History) -> list[Finding]:
    curve = history.grad_norm.finite
    zeros = curve.steps[curve.values == 0.0]
    if len(zeros) >= _ZEROS:
        return [
            Finding(
                "gradient-zero",
                int(zeros[0]),
                int(zeros[-1]),
                f"The gradient is zero in {len(zeros)} of {len(curve)} steps, first in step {zeros[0]}.",
                "Nothing is learned there: look whether rows keep supervised tokens within max_length, and whether the "
                "trained parameters are used (target_modules, frozen adapters).",
                lasting=bool(curve.values[-1] == 0.0),
            )
        ]
    if len(curve) < _LEAST_POINTS:
        return []
    return [*_growth(history), *_clipping(history)]


def _growth(history: History) -> list[Finding]:
    curve, loss = history.grad_norm.finite, history.loss.finite
    logs, count = logarithms(curve.values), len(curve)
    early, late = (
        float(np.median(part)) for part in (logs[count // 10 : 3 * count // 10], logs[-(count // 5) :])
    )
    if late - early < _GROWTH or len(loss) < _LEAST_POINTS:
        return []
    change, _ = total_change(logarithms(loss.values[len(loss) // 2 :]))
    if change < -_FALLS:
        return []
    first = int(curve.steps[count // 5])
    return [
        Finding(
            "gradient-growth",
            first,
            int(curve.steps[-1]),
            f"The gradient norm grew from {math.exp(early):.3g} at about step {first} to {math.exp(late):.3g}, and the "
            f"loss does not fall.",
            "This comes before divergence: lower learning_rate, and keep max_grad_norm at 1.",
        )
    ]


def _clipping(history: History) -> list[Finding]:
    limit, norms = history.max_grad_norm, history.grad_norm.finite
    if limit <= 0 or np.quantile(norms.values, 1 - _CLIPPED_SHARE) < _CLIPPED * limit:
        return []
    return [
        Finding(
            "clipping",
            int(norms.steps[0]),
            int(norms.steps[-1]),
            f"The gradient norm is {np.median(norms.values):.3g} (median), in nine steps of ten more than "
            f"{_CLIPPED:.0f} times max_grad_norm ({limit:g}).",
            "Every step is as long as the limit says, whatever its rows: harmless with Adam, a hidden learning rate "
            "with SGD. An unusually large lora_alpha, or a loss summed instead of averaged, makes such gradients.",
        )
    ]
