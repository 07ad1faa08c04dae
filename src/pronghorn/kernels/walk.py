"""The four products between one layer's attention and the next one's, for one row.

    x += o(attended);   x += down(f(gate) · up),  [gate | up] = gate_up(norm(x));   y = last(norm(x))

`last` is the next layer's q, k and v, or the head; to each the row's adapter may add B (A x). On Hopper all four are
one launch, whose programs go through the weights without a pause between products.

Shapes: attended [1, N·D], x [1, H]; sums are fp32, one rounding at the end of each product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, use_triton
from pronghorn.kernels.matvec import RowNorm, RowShare, adapter_down, matvec

#: numbers between the two factors of a product's adapters at most
MOST_HANDED = 128


class Adapters(NamedTuple):
    """a [slots, parts · R, in] and b [slots, out, R] with the scaling in it, both zero for slot 0; output i of part p
    (`ends`: where each part ends) takes columns p·R to (p+1)·R."""

    a: Tensor
    b: Tensor
    ends: tuple[int, ...]


class Product(NamedTuple):
    """weight [out, in], bias [out], the norm of what it multiplies, and what adapters add to it."""

    weight: Tensor
    bias: Tensor | None = None
    norm: RowNorm | None = None
    adapter: Adapters | None = None


class Walk(NamedTuple):
    """o: without a norm; gate_up: gate's rows first; down: without a norm; last. activation: of `kernels.glu`."""

    o: Product
    gate_up: Product
    down: Product
    last: Product
    activation: str


class Meeting(NamedTuple):
    """Where a walk's programs wait for each other; walks that may run at the same time need one each.

    Args:
        came: int64 [2], how many have come in all walks so far, and how many to adapters' meetings.
        lost: int64 [1], how many waited in vain, for about a second: then what that walk gave is worth nothing.
        shares: fp32 [programs · 4 · MOST_HANDED], what each program has of A x of the four products.
    """

    came: Tensor
    lost: Tensor
    shares: Tensor

    @staticmethod
    def beside(lost: Tensor) -> Meeting:
        """A new one that counts in `lost`."""
        device = lost.device
        on_gpu = device.type == "cuda"
        programs = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 0
        shares = torch.zeros(programs * 4 * MOST_HANDED, dtype=torch.float32, device=device)
        return Meeting(lost.new_zeros(2), lost, shares)


def walk(
    attended: Tensor,
    x: Tensor,
    steps: Walk,
    meeting: Meeting,
    *,
    slots: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """y [1, out of `last`]; x is written over with what is added to it. On a GPU `fits_walk` has to hold.

    Args:
        slots: int32 [1], which adapter the row takes, 0 for none; asked for where a product has adapters.
    """
    if use_triton(x, impl):
        from pronghorn.kernels.triton.walk import walk as by_triton

        return by_triton(attended, x, steps, meeting, slots, out_dtype or x.dtype)
    o, gate_up, down, last, activation = steps

    def times(
        y: Tensor,
        step: Product,
        residual: Tensor | None = None,
        activation: str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        share = None
        if step.adapter is not None:
            assert slots is not None
            a, b, ends = step.adapter
            share = RowShare(adapter_down(y, a, slots, step.norm, impl=impl), b, slots, ends)
        return matvec(
            y, [step.weight], norm=step.norm, bias=step.bias, share=share, residual=residual, activation=activation,
            out_dtype=out_dtype, impl=impl,
        )  # fmt: skip

    times(attended, o, residual=x)
    act = times(x, gate_up, activation=activation)
    times(act, down, residual=x)
    return times(x, last, out_dtype=out_dtype)


def fits_walk(steps: Walk) -> bool:
    """Whether `walk` takes these weights: on a CPU all, on a GPU those that its kernel for Hopper does."""
    device = steps.o.weight.device
    if device.type != "cuda":
        return True
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    from pronghorn.kernels.triton.walk import fits

    return fits(steps)
