"""Products in 16 bits that add the adapter's share, and a residual, themselves (`kernels.products`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pronghorn.blocks import joining
from pronghorn.kernels import tiles
from pronghorn.kernels.heads import Heads, rotated_heads
from pronghorn.kernels.heads import why_not as why_no_heads
from pronghorn.kernels.lora import LowRank
from pronghorn.kernels.products import MOST_RANK, Product, multiply, why_not
from pronghorn.weights import Weight

#: Longest sum of an input gradient. In whole steps of 8B at the limit of the card's power (H200) those of o (4,096) and
#: of q, k, v (6,144) gain 2.2 ms together with the outputs, that of gate and up (28,672) loses 2.0: cuBLAS's product of
#: that shape draws less.
LONGEST_SUM = 8192


def output(
    weight: Weight, x: Tensor, share: LowRank | None, residual: Tensor | None, out: Tensor | None = None
) -> Tensor | None:
    """x Wᵀ + the adapter's share (+ residual) [T, out] by one launch, into `out` where that is given (it may be the
    residual); None where the matrix library makes it. A scaling that is no power of two rounds XA once more."""
    ready = _ready(weight, x.dtype)
    if ready is None:
        return None
    b = None if share is None else share.b.contiguous()
    if why_not(x, ready, True, 0 if b is None else b.shape[1], b, residual, out) is not None:
        return None
    xa = None if share is None else share.xa if share.scaling == 1.0 else share.xa * share.scaling
    return multiply(Product(x, ready, True, xa, b, residual), out)


def weight_of_input_grad(weight: Weight, dy: Tensor, rank: int) -> Tensor | None:
    """The weight as `input_grad` multiplies dY with it, adding adapters of `rank` in all; None where the matrix library
    is to."""
    ready = _ready(weight, dy.dtype)
    if ready is None or dy.shape[1] > LONGEST_SUM or why_not(dy, ready, False, rank) is not None:
        return None
    return ready


def input_grad(weight: Tensor, dy: Tensor, dxa: Tensor, a: Tensor) -> Tensor:
    """dy W + dXA A [T, in] by one launch."""
    return multiply(Product(dy, weight, False, dxa, a))


def heads(
    weight: Weight | None,
    x: Tensor,
    shares: Sequence[LowRank | None],
    xa: Tensor,
    angles: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor] | None:
    """q, k and v of x with their adapters' shares, q and k rotated by cos and sin, by one launch; None where no kernel
    does that. `weight` is that of all three; xa [T, ΣR] is what the shares are columns of."""
    ready = None if weight is None else _ready(weight, x.dtype)
    first, *others = shares
    if ready is None or first is None:
        return None
    same = [share for share in others if share is not None and share.scaling == first.scaling]
    if len(same) != 2:
        return None
    bs = (first.b.contiguous(), same[0].b.contiguous(), same[1].b.contiguous())
    widths = (bs[0].shape[0], bs[1].shape[0], bs[2].shape[0])
    call = Heads(x, ready, widths, xa, bs, *angles)
    if why_no_heads(call) is not None:
        return None
    return rotated_heads(call if first.scaling == 1.0 else replace(call, xa=xa * first.scaling))


def takes_rank(device: torch.device, dtype: torch.dtype, rank: int) -> bool:
    """Whether adapters of `rank` in all (0: none) are ones that products in 16 bits of this GPU add."""
    known = joining.ADAPTERS_IN_PRODUCTS and tiles.why_not(device, dtype) is None
    return known and rank <= MOST_RANK and rank % 8 == 0


def _ready(weight: Weight, dtype: torch.dtype) -> Tensor | None:
    return weight.ready(dtype) if joining.ADAPTERS_IN_PRODUCTS else None
