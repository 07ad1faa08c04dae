"""How far each point of a curve is above what was before it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pronghorn.tuning.curves.robust import logarithms, noise, trailing

#: Points before a step that it is compared with, and how many at the beginning of a run. A spread out of fewer is
#: itself off by a third, and a threshold of eight of them is then one of six.
BEFORE, BEFORE_AT_FIRST = 32, 16


@dataclass(frozen=True)
class Rises:
    """Logarithms fp64 [n] of a curve's values; and of each from index `BEFORE_AT_FIRST` on the median of those before
    (`base`), what it is above that, and the spread."""

    logs: np.ndarray
    base: np.ndarray
    above: np.ndarray
    spreads: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Rises:
        """Of more than `BEFORE_AT_FIRST` values without gaps."""
        logs = logarithms(values)
        base, spreads = _before(logs)
        # A spread out of 32 points is off by a fifth, and the least of many is chance: half of it is the whole curve's.
        spreads = np.sqrt(np.maximum(spreads * noise(logs), 1e-18))
        return cls(logs, base, logs[BEFORE_AT_FIRST:] - base, spreads)


def _before(logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and spread of the points before each one from index `BEFORE_AT_FIRST` on."""
    early = trailing(logs[:BEFORE], BEFORE_AT_FIRST)
    if len(logs) <= BEFORE:
        return early
    base, spreads = (np.concatenate(parts) for parts in zip(early, trailing(logs, BEFORE), strict=True))
    return base, spreads
