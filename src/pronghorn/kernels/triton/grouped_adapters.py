"""B of stacked adapters turned from one order into the other in Triton; see `kernels.grouped_adapters`.

A program takes some outputs with all their ranks and experts: whole rows of PEFT's order on one side, runs of
outputs · R on the other.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

#: elements a program turns
TILE = 8192


@triton.jit
def _turn(
    from_ptr, to_ptr, scaling, outs, rank, experts,
    STACK: tl.constexpr, E: tl.constexpr, R: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    e = tl.arange(0, E)[:, None, None]
    o = tl.program_id(0) * BO + tl.arange(0, BO)[None, :, None]
    r = tl.arange(0, R)[None, None, :]
    known = (e < experts) & (o < outs) & (r < rank)
    in_peft = (o * rank + r).to(tl.int64) * experts + e
    in_stack = (e.to(tl.int64) * outs + o) * rank + r
    value = (
        tl.load(from_ptr + (in_peft if STACK else in_stack), mask=known, other=0.0).to(tl.float32) * scaling
    )
    tl.store(to_ptr + (in_stack if STACK else in_peft), value.to(to_ptr.dtype.element_ty), mask=known)


def _run(
    source: Tensor, target: Tensor, scaling: float, sizes: tuple[int, int, int], stacking: bool
) -> Tensor:
    experts, outs, rank = sizes
    e, r = triton.next_power_of_2(experts), triton.next_power_of_2(rank)
    block = max(1, TILE // (e * r))
    _turn[(triton.cdiv(outs, block),)](
        source, target, scaling, outs, rank, experts, STACK=stacking, E=e, R=r, BO=block, num_warps=8
    )
    return target


def stack(b: Tensor, scaling: float, stacked: Tensor) -> Tensor:
    return _run(b.contiguous(), stacked, scaling, tuple(stacked.shape), True)  # type: ignore[arg-type]


def unstack(stacked: Tensor, scaling: float, b: Tensor) -> Tensor:
    return _run(stacked.contiguous(), b, scaling, tuple(stacked.shape), False)  # type: ignore[arg-type]
