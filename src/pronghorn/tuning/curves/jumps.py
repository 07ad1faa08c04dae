"""Single steps that jump, and the rows that were in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pronghorn.tuning.curves.finding import Finding
from pronghorn.tuning.curves.history import Curve, History
from pronghorn.tuning.curves.rises import BEFORE_AT_FIRST

#: A jump in spreads of the steps before it. Normal noise would never get there; batches of uneven rows have wider
#: tails, and made-up runs with such noise get there about once in 10^5 steps.
_SPREADS = 8.0
#: Of a loss and its gradient's norm in the same step: batches of few rows vary so much that one bad row is less.
_SPREADS_OF_BOTH = 4.5
#: Of steps that stand out without being spikes: several that share a row say as much. The highest of them.
_SPREADS_OF_SEVERAL, _OUTSTANDING = 3.5, 64
#: Their median where they share a row: rows differ, and where a batch is one row, the hardest of 10^5 healthy ones is
#: at 4.3 spreads in every epoch.
_SPREADS_OF_SHARED = 4.5
#: How many rows shared by chance are expected at most, of spikes and of steps that stand out.
_CHANCE, _CHANCE_OF_SEVERAL = 0.05, 0.01
#: A jump as a factor, of a loss and of a gradient norm, that is worth a word: norms vary that much by themselves.
_LOSS_FACTOR, _NORM_FACTOR, _NORM_BESIDE = 1.3, 10.0, 2.0
#: Nats: near a loss of zero, factors mean nothing.
_LEAST_RISE = 0.1
#: Points after a jump that show whether it is over.
_AFTER = 3
#: Told one by one; of more, the largest.
_TOLD = 5
_ROWS_SHOWN = 8


@dataclass(frozen=True)
class Jump:
    """Indices first … last of a curve, what was before (`base`), the largest value and the largest rise in spreads."""

    first: int
    last: int
    base: float
    peak: float
    spreads: float


def jumps(curve: Curve, factor: float, least: float, many: float = _SPREADS) -> list[Jump]:
    """Where a curve without gaps leaves what it was before by `many` spreads, and comes back within a few points."""
    values, width = curve.values, BEFORE_AT_FIRST
    if len(values) <= width + _AFTER:
        return []
    logs, base, rise, spreads = curve.rises.logs, curve.rises.base, curve.rises.above, curve.rises.spreads
    high = (rise > np.maximum(many * spreads, math.log(factor))) & (values[width:] - np.exp(base) > least)
    found = []
    for first, last in _runs(np.flatnonzero(high)):
        after = logs[width + last + 1 : width + last + 1 + 2 * _AFTER - 1]
        level = float(base[first])
        top = float(rise[first : last + 1].max())
        if len(after) >= _AFTER and np.median(after) < level + top / 2:
            peak = float(values[width + first : width + last + 1].max())
            most = float((rise / spreads)[first : last + 1].max())
            found.append(Jump(width + first, width + last, math.exp(level), peak, most))
    return found


def _runs(indices: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last of indices that follow one another, one left out at most."""
    if not len(indices):
        return
    breaks = np.flatnonzero(np.diff(indices) > 2)
    for start, end in zip((0, *(breaks + 1)), (*breaks, len(indices) - 1), strict=True):
        yield int(indices[start]), int(indices[end])


def spikes(history: History) -> list[Finding]:
    """Jumps of the loss and of the gradient norm, each with its rows, and rows that several of them share."""
    loss, norm = history.loss.finite, history.grad_norm.finite
    in_loss = _loss_jumps(loss, norm)
    found = [_loss_spike(history, loss, norm, jump) for jump in _largest(in_loss)]
    steps = {int(step) for jump in in_loss for step in loss.steps[jump.first : jump.last + 1]}
    alone = [
        jump for jump in jumps(norm, _NORM_FACTOR, 0.0)
        if not steps & set(range(int(norm.steps[jump.first]) - 1, int(norm.steps[jump.last]) + 2))
    ]  # fmt: skip
    found += [_norm_spike(history, norm, jump) for jump in _largest(alone)]
    shared = _shared_by_spikes(history, loss, in_loss) or _shared_by_outstanding(history, loss)
    return found + ([shared] if shared is not None else [])


def outstanding_steps(history: History) -> list[int]:
    """Steps whose rows are worth keeping: single ones may be chance, several that share a row are not."""
    loss = history.loss.finite
    spans = (_steps(history, loss, jump) for jump in _outstanding(loss))
    return [step for first, last, _ in spans for step in range(first, last + 1)]


def _outstanding(loss: Curve) -> list[Jump]:
    found = jumps(loss, _LOSS_FACTOR, _LEAST_RISE, _SPREADS_OF_SEVERAL)
    return sorted(sorted(found, key=lambda jump: -jump.spreads)[:_OUTSTANDING], key=lambda jump: jump.first)


def _loss_jumps(loss: Curve, norm: Curve) -> list[Jump]:
    """Jumps of the loss that are far, or less far and of the gradient's norm as well."""
    far = {jump.first: jump for jump in jumps(loss, _LOSS_FACTOR, _LEAST_RISE)}
    both = {
        int(step)
        for jump in jumps(norm, _NORM_BESIDE, 0.0, _SPREADS_OF_BOTH)
        for step in norm.steps[jump.first : jump.last + 1]
    }
    near = [
        jump for jump in jumps(loss, _LOSS_FACTOR, _LEAST_RISE, _SPREADS_OF_BOTH)
        if both & {int(step) for step in loss.steps[jump.first : jump.last + 1]}
    ]  # fmt: skip
    covered = {at for jump in far.values() for at in range(jump.first, jump.last + 1)}
    found = [*far.values(), *(jump for jump in near if not covered & set(range(jump.first, jump.last + 1)))]
    return sorted(found, key=lambda jump: jump.first)


def _largest(found: Sequence[Jump]) -> list[Jump]:
    largest = sorted(found, key=lambda jump: jump.base / jump.peak)[:_TOLD]
    return sorted(largest, key=lambda jump: jump.first)


def _loss_spike(history: History, loss: Curve, norm: Curve, jump: Jump) -> Finding:
    first, last, back = _steps(history, loss, jump)
    rows = _rows(history, first, last)
    gradient = norm.between(first, last).values
    usual = float(np.median(norm.values)) if len(norm) else 0.0
    also = ""
    if len(gradient) and gradient.max() > 2 * usual > 0:
        also = f", with a gradient norm of {gradient.max():.3g} (median {usual:.3g})"
    return Finding(
        "spike",
        first,
        last,
        f"The loss jumped from {jump.base:.4g} to {jump.peak:.4g} in {_when(first, last)}{also}, and was back by step "
        f"{back}.{_named(rows)}",
        "Look at these rows: broken text, another language, wrong labels or lengths far from the others'. One spike "
        "does no lasting harm while max_grad_norm clips.",
        rows,
        lasting=False,
    )


def _norm_spike(history: History, norm: Curve, jump: Jump) -> Finding:
    first, last, back = _steps(history, norm, jump)
    rows = _rows(history, first, last)
    return Finding(
        "gradient-spike",
        first,
        last,
        f"The gradient norm jumped from {jump.base:.3g} to {jump.peak:.3g} in {_when(first, last)}, and was back by "
        f"step {back}.{_named(rows)}",
        "Keep max_grad_norm at 1, which takes its force; look at these rows where it comes again.",
        rows,
        lasting=False,
    )


def _steps(history: History, curve: Curve, jump: Jump) -> tuple[int, int, int]:
    """First and last step of a jump, and the one that is over it; a point may be the average of several steps."""
    first = int(curve.steps[jump.first]) - history.averaged + 1
    return max(first, 1), int(curve.steps[jump.last]), int(curve.steps[jump.last + 1])


def _when(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _rows(history: History, first: int, last: int) -> tuple[int, ...]:
    return tuple(row for step in range(first, last + 1) for row in history.rows.get(step, ()))


def _named(rows: Sequence[int]) -> str:
    """Row numbers of the data as given, from 0."""
    if not rows:
        return ""
    shown = ", ".join(map(str, rows[:_ROWS_SHOWN]))
    more = f" and {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else ""
    return f" Its row{'s' if len(rows) > 1 else ''} of the training data: {shown}{more}."


def _shared_by_spikes(history: History, loss: Curve, found: Sequence[Jump]) -> Finding | None:
    return _spike_rows(history, loss, found, _shared(history, loss, found, _CHANCE), "spikes")


def _shared_by_outstanding(history: History, loss: Curve) -> Finding | None:
    """Of steps that need be no spikes. Where most of them are without such a row, standing out is common."""
    found = _outstanding(loss)
    shared = {
        row: places for row, places in _shared(history, loss, found, _CHANCE_OF_SEVERAL).items()
        if np.median([found[at].spreads for at in places]) >= _SPREADS_OF_SHARED
    }  # fmt: skip
    if 2 * len({at for places in shared.values() for at in places}) <= len(found):
        return None
    return _spike_rows(history, loss, found, shared, "steps whose loss stands out")


def _shared(history: History, loss: Curve, found: Sequence[Jump], chance: float) -> dict[int, list[int]]:
    """Rows in the most jumps, with the indices of these: shuffled anew in every epoch, steps share rows by chance only.

    Of S steps with B rows each, C(S, k) · B · (B/N)^(k-1) rows are expected to be in k of them: at most `chance`.
    """
    spans = [_steps(history, loss, jump)[:2] for jump in found]
    places: dict[int, list[int]] = {}
    for at, span in enumerate(spans):
        for row in set(_rows(history, *span)):
            places.setdefault(row, []).append(at)
    most = max(map(len, places.values()), default=0)
    if most < 2 or not history.steps_per_epoch:
        return {}
    per_jump = sum(map(len, places.values())) / len(found)
    # B/N is one over the steps of an epoch, times the steps that a jump is made of.
    wide = sum(last - first + 1 for first, last in spans) / len(spans)
    share = min(wide / history.steps_per_epoch, 1.0)
    if math.comb(len(found), most) * per_jump * share ** (most - 1) > chance:
        return {}
    return {row: places[row] for row in sorted(places) if len(places[row]) == most}


def _spike_rows(
    history: History, loss: Curve, found: Sequence[Jump], shared: Mapping[int, Sequence[int]], called: str
) -> Finding | None:
    if not shared:
        return None
    rows, places = tuple(shared), sorted({at for of_row in shared.values() for at in of_row})
    highest = max((found[at] for at in places), key=lambda jump: jump.peak)
    shown = ", ".join(map(str, rows[:_ROWS_SHOWN]))
    subject = f"Row {shown} was" if len(rows) == 1 else f"Rows {shown} were"
    return Finding(
        "spike-rows",
        _steps(history, loss, found[places[0]])[0],
        _steps(history, loss, found[places[-1]])[1],
        f"{subject} in {len(shared[rows[0]])} of {len(found)} {called}, up to {highest.peak:.4g} from "
        f"{highest.base:.4g} before.",
        "Read these rows first, and `pronghorn data check` them; without them the spikes should end.",
        rows,
        lasting=False,
    )
