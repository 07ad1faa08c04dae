"""Cross-entropy of a chunk of logits in Triton: a program a row, two passes, the gradient over the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: The lowest number of fp32: below every logit, and unlike -inf it may be subtracted from -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _capped(x, scale, softcap, SOFTCAP: tl.constexpr):
    x = x * scale
    if SOFTCAP:
        # tanh z = 2 σ(2z) - 1
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)
    return x


@triton.jit
def _cross_entropy(
    logits_ptr, labels_ptr, losses_ptr, correct_ptr, row_stride, width, ignore_index, scale, softcap,
    SOFTCAP: tl.constexpr, NEED_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    row = logits_ptr + index.to(tl.int64) * row_stride
    label = tl.load(labels_ptr + index)
    columns = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(losses_ptr + index, 0.0)
        tl.store(correct_ptr + index, 0)
        if NEED_GRAD:
            nothing = tl.zeros([BLOCK], logits_ptr.dtype.element_ty)
            for start in range(0, width, BLOCK):
                tl.store(row + start + columns, nothing, mask=start + columns < width)
    else:
        # A lane's running maximum and sum; lanes are put together once, after the loop. One of the two numbers is its
        # own maximum, so that one exponential serves both: they, not memory, are what the first pass waits for.
        highest = tl.full([BLOCK], LOWEST, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            x = tl.load(row + start + columns, mask=start + columns < width, other=float("-inf")).to(
                tl.float32
            )
            x = tl.where(start + columns < width, _capped(x, scale, softcap, SOFTCAP), float("-inf"))
            above = x - highest
            less = tl.exp(-tl.abs(above))
            total = tl.where(above > 0.0, total * less + 1.0, total + less)
            highest = tl.maximum(highest, x)
        top = tl.max(highest, 0)
        lse = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
        # A label outside the vocabulary loads NaN, so that the loss shows it.
        known = (label >= 0) & (label < width)
        target = tl.load(row + label, mask=known, other=float("nan")).to(tl.float32)
        target = _capped(target, scale, softcap, SOFTCAP)
        tl.store(losses_ptr + index, lse - target)
        tl.store(correct_ptr + index, (target >= top).to(tl.int8))
        if NEED_GRAD:
            # Every thread has read the label's logit before any overwrites it.
            tl.debug_barrier()
            for start in range(0, width, BLOCK):
                inside = start + columns < width
                x = tl.load(row + start + columns, mask=inside, other=0.0).to(tl.float32)
                x = _capped(x, scale, softcap, SOFTCAP)
                grad = tl.exp(x - lse) - (start + columns == label).to(tl.float32)
                if SOFTCAP:
                    ratio = x / softcap
                    grad = grad * (1.0 - ratio * ratio)
                grad = grad * scale
                tl.store(row + start + columns, grad.to(logits_ptr.dtype.element_ty), mask=inside)


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    correct: Tensor,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    need_grad: bool,
) -> None:
    """Losses fp32 [n] and hits bool [n] are written; logits [n, V] become d(Σ loss)/d(logits) if `need_grad`."""
    rows, width = logits.shape
    if not rows:
        return
    block = min(triton.next_power_of_2(width), 4096)
    # 1,280 rows of 128,256: 328 µs with 8 warps, 280 with 16 (H200).
    warps = {4096: 16, 2048: 8}.get(block, 4)
    _cross_entropy[(rows,)](
        logits, labels, losses, correct.view(dtype=torch.int8), logits.stride(0), width, ignore_index, logit_scale,
        1.0 if softcap is None else softcap,
        SOFTCAP=softcap is not None, NEED_GRAD=need_grad, BLOCK=block, num_warps=warps,
    )  # fmt: skip
