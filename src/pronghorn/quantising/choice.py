"""One form for each module, with the least harm in all that fits into a budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: the budget is divided into at most so many parts, and each option's bytes are rounded up to whole ones
_PARTS = 1 << 16


@dataclass(frozen=True)
class Option:
    """What a module takes and costs in one form."""

    nbytes: int
    harm: float


def choose(options: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """For each module the index of the option taken: the least Σ harm of all choices with Σ nbytes ≤ budget.

    A multiple-choice knapsack by dynamic programming over bytes above the smallest choice; exact up to rounding these
    to 1 / 65,536 of what there is to spend. None where even the smallest options do not fit.
    """
    least = [min(option.nbytes for option in module) for module in options]
    spare = budget - sum(least)
    if spare < 0:
        return None
    # Rounding each module's bytes up must not cost more than it has to: nobody spends more than the dearest options.
    spare = min(spare, sum(max(o.nbytes for o in module) for module in options) - sum(least))
    unit = max(1, -(-spare // _PARTS))
    room = spare // unit
    best = np.zeros(room + 1)  # best[b]: least harm of the modules so far within b units
    taken = np.zeros((len(options), room + 1), dtype=np.int16)
    for row, (module, smallest) in enumerate(zip(options, least, strict=True)):
        now = np.full(room + 1, np.inf)
        for index, option in enumerate(module):
            units = -(-(option.nbytes - smallest) // unit)
            if units > room:
                continue
            harm = best[: room + 1 - units] + option.harm
            better = harm < now[units:]
            now[units:][better] = harm[better]
            taken[row, units:][better] = index
        best = now
    found, left = [], room
    for row in range(len(options) - 1, -1, -1):
        index = int(taken[row, left])
        found.append(index)
        left -= -(-(options[row][index].nbytes - least[row]) // unit)
    return found[::-1]
