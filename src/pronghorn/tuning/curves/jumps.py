"""Single steps that jump, and the rows that were in them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pronghorn.tuning.curves.finding import Finding
from pronghorn.tuning.curves.history import Curve, History
from pronghorn.tuning.curves.robust import logarithms, trailing

#: Points before a step that it is compared with, and how many of a short run. A spread out of fewer is itself off by a
#: third, and a threshold of eight of them is then one of six.
_BEFORE, _BEFORE_IN_SHORT_RUNS, _SHORT_RUN = 32, 16, 80
#: A jump in spreads of the steps before it. Normal noise would never get there; batches of uneven rows have wider
#: tails, and made-up runs with such noise get there about once in 10^5 steps.
_SPREADS = 8.0
#: Of a loss and its gradient's norm in the same step: batches of few rows vary so much that one bad row is less.
_SPREADS_OF_BOTH = 4.5
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
    """Indices first … last of a curve, what was before (`base`), and the largest value among them."""

    first: int
    last: int
    base: float
    peak: float


def jumps(curve: Curve, factor: float, least: float, many: float = _SPREADS) -> list[Jump]:
    """Where a curve without gaps leaves what it was before by `many` spreads, and comes back within a few points."""
    values = curve.values
    width = _BEFORE if len(values) >= _SHORT_RUN else _BEFORE_IN_SHORT_RUNS
    if len(values) <= width + _AFTER:
        return []
    logs = logarithms(values)
    base, spreads = trailing(logs, width)
    rise = logs[width:] - base
    high = (rise > np.maximum(many * spreads, math.log(factor))) & (values[width:] - np.exp(base) > least)
    found = []
    for first, last in _runs(np.flatnonzero(high)):
        after = logs[width + last + 1 : width + last + 1 + 2 * _AFTER - 1]
        level = float(base[first])
        top = float(rise[first : last + 1].max())
        if len(after) >= _AFTER and np.median(after) < level + top / 2:
            peak = float(values[width + first : width + last + 1].max())
            found.append(Jump(width + first, width + last, math.exp(level), peak))
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
    shared = _shared_rows(history, loss, in_loss)
    return found + ([shared] if shared is not None else [])


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


def _shared_rows(history: History, loss: Curve, found: Sequence[Jump]) -> Finding | None:
    """Rows in several spikes: shuffled anew in every epoch, steps share rows by chance only.

    Of S steps with B rows each, C(S, k) · B · (B/N)^(k-1) rows are expected to be in k of them. Fewer than 0.05 is no
    chance.
    """
    steps = [_steps(history, loss, jump)[:2] for jump in found]
    counts = Counter(row for first, last in steps for row in set(_rows(history, first, last)))
    if len(steps) < 2 or not counts or not history.steps_per_epoch:
        return None
    per_spike = sum(counts.values()) / len(steps)
    most = max(counts.values())
    # B/N is one over the steps of an epoch, times the steps that a spike is made of.
    wide = sum(last - first + 1 for first, last in steps) / len(steps)
    share = min(wide / history.steps_per_epoch, 1.0)
    if most < 2 or math.comb(len(steps), most) * per_spike * share ** (most - 1) > 0.05:
        return None
    rows = tuple(sorted(row for row, count in counts.items() if count == most))
    subject = (
        f"Row {rows[0]} was" if len(rows) == 1 else f"Rows {', '.join(map(str, rows[:_ROWS_SHOWN]))} were"
    )
    return Finding(
        "spike-rows",
        steps[0][0],
        steps[-1][1],
        f"{subject} in {most} of {len(steps)} spikes.",
        "Read these rows first, and `pronghorn data check` them; without them the spikes should end.",
        rows,
        lasting=False,
    )
