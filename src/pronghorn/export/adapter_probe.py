"""The probe of the gate: is what each adapter changes in the weights also in what was written?"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

logger = logging.getLogger("pronghorn")

#: A change that is in the file is found there with a factor of 1, one that was forgotten with 0.
_FOUND, _SURE = 0.5, 0.15


def look_for_changes(
    weights: Iterable[tuple[str, Tensor, Tensor, Tensor]],
) -> tuple[int, list[str]]:
    """Look for what the adapters changed in every weight of an export.

        c = <F − W, Δ> / <Δ, Δ>,   Δ = W' − W

    F the written weight, W the base's, W' the merged one. Rounding errors are hardly correlated with Δ, so c is 1 up to
    ‖F − W'‖ / (‖Δ‖ √n), and 0 where the adapter is not in it: forgotten, or swallowed by the format, as when W lies on
    the format's own steps already (a base that was quantised) and Δ is smaller than half a step. Where that uncertainty
    is too large, as for an adapter that was hardly trained, nothing is concluded. Nor is it a failure where F is W'
    rounded to 16 bits, element by element: no such file holds a change of less than half a step of a 16-bit base, as
    after very few steps of training; a warning says so.

    Args:
        weights: (name, W, W', F) in fp32, all of one shape; one is held at a time.

    Returns:
        (how many were looked at, problems).
    """
    count, unchanged, lost, below = 0, [], [], 0
    for name, base, merged, written in weights:
        count += 1
        change = merged - base
        size = _sum(change * change)
        if size == 0.0:
            unchanged.append(name)
            continue
        written = written.to(merged.device)
        factor = _sum((written - base) * change) / size
        unsure = (_sum((written - merged) ** 2) / (size * change.numel())) ** 0.5
        if factor < _FOUND and unsure < _SURE:
            if _is_rounded(merged, written):
                below += 1
                continue
            lost.append(f"{name}: {factor:.2f} of its adapter's change is left")
    warn_of_unchanged(unchanged, count)
    if below:
        logger.warning(
            "pronghorn: the adapter changes %d of %d weights by less than 16 bits can hold, as after very few steps; "
            "the adapter itself has the whole change",
            below,
            count,
        )
    return count, [
        f"{len(lost)} of {count} adapted weights lost their adapter, first {lost[0]}"
    ] if lost else []


def _is_rounded(merged: Tensor, written: Tensor) -> bool:
    """Whether `written` is `merged` in 16 bits."""
    return any(torch.equal(merged.to(dtype).float(), written) for dtype in (torch.bfloat16, torch.float16))


def warn_of_unchanged(unchanged: list[str], count: int) -> None:
    """Say that adapters are as they were initialised."""
    if unchanged:
        logger.warning(
            "pronghorn: %d of %d adapters change nothing (B is zero), first %s",
            len(unchanged),
            count,
            unchanged[0],
        )


def _sum(tensor: Tensor) -> float:
    return float(tensor.sum(dtype=torch.float64))
