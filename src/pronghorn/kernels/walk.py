"""The four products between one layer's attention and the next one's, for one row.

    x += o(attended);   x += down(f(gate) · up),  [gate | up] = gate_up(norm(x));   y = last(norm(x))

`last` is the next layer's q, k and v, or the head. On Hopper all four are one launch, whose programs go through the
weights without a pause between products.

Shapes: attended [1, N·D], x [1, H]; sums are fp32, one rounding at the end of each product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, use_triton
from pronghorn.kernels.matvec import RowNorm, matvec


class Product(NamedTuple):
    """weight [out, in], bias [out], and the norm of what it multiplies."""

    weight: Tensor
    bias: Tensor | None = None
    norm: RowNorm | None = None


class Walk(NamedTuple):
    """o: without a norm; gate_up: gate's rows first; down: without a norm; last. activation: of `kernels.glu`."""

    o: Product
    gate_up: Product
    down: Product
    last: Product
    activation: str


class Meeting(NamedTuple):
    """Where a walk's programs wait for each other, int64 [1] both; walks that may run at the same time need one each.

    Args:
        came: how many have come, in all walks so far.
        lost: how many waited in vain, for about a second: then what that walk gave is worth nothing.
    """

    came: Tensor
    lost: Tensor


def walk(
    attended: Tensor,
    x: Tensor,
    steps: Walk,
    meeting: Meeting,
    *,
    out_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """y [1, out of `last`]; x is written over with what is added to it. On a GPU `fits_walk` has to hold."""
    if use_triton(x, impl):
        from pronghorn.kernels.triton.walk import walk as by_triton

        return by_triton(attended, x, steps, meeting, out_dtype or x.dtype)
    o, gate_up, down, last, activation = steps
    matvec(attended, [o.weight], bias=o.bias, residual=x, impl=impl)
    act = matvec(x, [gate_up.weight], norm=gate_up.norm, bias=gate_up.bias, activation=activation, impl=impl)
    matvec(act, [down.weight], bias=down.bias, residual=x, impl=impl)
    return matvec(x, [last.weight], norm=last.norm, bias=last.bias, out_dtype=out_dtype, impl=impl)


def fits_walk(steps: Walk) -> bool:
    """Whether `walk` takes these weights: on a CPU all, on a GPU those that its kernel for Hopper does."""
    device = steps.o.weight.device
    if device.type != "cuda":
        return True
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    from pronghorn.kernels.triton.walk import fits

    return fits(steps)
