"""A weight times one row, as decoding does it: bound by reading the weight once, so all else is done on the way.

    y = norm(x) Wᵀ + bias + share (+ residual),      or with an activation   act = f(gate) · up,  [gate | up] = y

The norm's weight multiplies x on the way in and its 1/rms the sums on the way out, so that it needs no pass of its own.
The row may take an adapter: share = s · (norm(x) Aᵀ) Bᵀ with A and B out of tables. Several rows, each with an adapter
of its own, have their shares from `adapter_down` and `adapter_up_` beside an ordinary product, which is faster from two
rows on (8B, four rows on an H200: 105 µs for gate and up with all on the way, 64 by cuBLAS).

Shapes: B rows, `in` and `out` of W [out, in]; sums are fp32, one rounding at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pronghorn.kernels.dispatch import Impl, math_dtype, use_triton
from pronghorn.kernels.glu import APPROXIMATE
from pronghorn.kernels.nf4 import FourBits, dequantize_4bit

#: places from which programs take what others of their launch hand on: one is a line of the second cache, from which a
#: thousand programs would wait for each other (8B on an H200: 20 µs a layer)
HANDED_COPIES = 32


class RowNorm(NamedTuple):
    """RMSNorm of x: x / rms(x) · (weight + offset)."""

    weight: Tensor
    eps: float
    offset: float = 0.0


class RowShare(NamedTuple):
    """What each row's adapter adds: xa fp32 [B, parts · R] from `adapter_down`; b [slots, out, R] with the scaling in
    it; slots int32 [B], 0 for none. Output i of part p (`ends`: where each part ends) takes columns p·R to (p+1)·R."""

    xa: Tensor
    b: Tensor
    slots: Tensor
    ends: tuple[int, ...]


class RowAdapter(NamedTuple):
    """The adapter of one row, both of whose products ride in the weight's launch: some programs multiply x by A, the
    others add B to their outputs once they see all of xa.

    a [slots, parts · R, in] and the others as in `RowShare`, slots [1]. handed int64 [HANDED_COPIES, parts · R]: where
    xa is handed on, each number beside the turn, int32 [1], which has to be another one in every call with the same
    `handed`.
    """

    a: Tensor
    b: Tensor
    slots: Tensor
    ends: tuple[int, ...]
    handed: Tensor
    turn: Tensor

    def share(self, x: Tensor, norm: RowNorm | None, impl: Impl | None = None) -> RowShare:
        """The same in launches of its own."""
        return RowShare(adapter_down(x, self.a, self.slots, norm, impl=impl), self.b, self.slots, self.ends)


class FourBit(NamedTuple):
    """A weight [rows, in] in 4 bits, `in` a multiple of its blocks' size; `numbers` is what its code holds, on the
    host."""

    bits: FourBits
    numbers: tuple[float, ...]

    @property
    def rows(self) -> int:
        return self.bits.shape[0]


def matvec(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    norm: RowNorm | None = None,
    bias: Tensor | None = None,
    share: RowShare | RowAdapter | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """y [1, out] for x [1, in], or act [1, out / 2].

    Args:
        weights: up to three [out_i, in] with out = Σ out_i; with an activation one, or gate and up.
        bias: [out]. residual: [1, out], written over with the result, which has its dtype then.
        activation: of `kernels.glu`; the first half of the outputs is gate, the second up.
        out_dtype: None is x's.
    """
    if use_triton(x, impl):
        from pronghorn.kernels.triton.matvec import dense

        return dense(x, weights, norm, bias, share, residual, activation, out_dtype or x.dtype)
    share = share.share(x, norm, "torch") if isinstance(share, RowAdapter) else share
    wide = [weight.to(math_dtype(x.dtype)) for weight in weights]
    y = _normed(x, norm) @ torch.cat(wide).t()
    return _finished(y, x, bias, share, residual, activation, out_dtype)


def matvec_4bit(
    x: Tensor,
    parts: Sequence[FourBit],
    *,
    norm: RowNorm | None = None,
    bias: Tensor | None = None,
    share: RowShare | RowAdapter | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """`matvec` by up to three weights with the same input; the codes are read as they are. Several rows, for which
    `fits_few_rows` holds, go through the matrix units, without adapters."""
    if use_triton(x, impl):
        if len(x) > 1:
            from pronghorn.kernels.triton.skinny import few_rows

            return few_rows(x, parts, norm, bias, residual, activation, out_dtype or x.dtype)
        if x.is_cuda:
            from pronghorn.kernels.triton.four_bit_row import fits, four_bit_row

            if fits(x, parts, activation):
                share = share.share(x, norm) if isinstance(share, RowAdapter) else share
                return four_bit_row(x, parts, norm, bias, share, residual, activation, out_dtype or x.dtype)
        from pronghorn.kernels.triton.matvec_4bit import four_bit

        return four_bit(x, parts, norm, bias, share, residual, activation, out_dtype or x.dtype)
    share = share.share(x, norm, "torch") if isinstance(share, RowAdapter) else share
    dtype = math_dtype(x.dtype)
    weights = [dequantize_4bit(part.bits, dtype, impl="torch") for part in parts]
    y = _normed(x, norm) @ torch.cat(weights).t()
    return _finished(y, x, bias, share, residual, activation, out_dtype)


def fits_few_rows(x: Tensor, parts: Sequence[FourBit]) -> bool:
    """Whether the matrix units take the rows of x, which they multiply in bf16, times these weights."""
    bits = [part.bits for part in parts]
    return (
        len(x) <= 64
        and x.dtype == torch.bfloat16
        and bool(parts)
        and all(
            b.shape[0] % 64 == 0
            and b.blocksize % 64 == 0
            and b.shape[1] % (4 * b.blocksize) == 0
            and b.shape[0] * b.shape[1] < 2**31
            and (b.nested is None or (b.nested[3] % 4 == 0 and b.absmax.data_ptr() % 4 == 0))
            for b in bits
        )
    )


def adapter_down(
    x: Tensor, a: Tensor, slots: Tensor, norm: RowNorm | None = None, *, impl: Impl | None = None
) -> Tensor:
    """xa fp32 [B, J] = norm(x)[b] a[slots[b]]ᵀ for a [slots, J, in]; zero where the slot is 0."""
    if use_triton(x, impl):
        from pronghorn.kernels.triton.matvec import down

        return down(x, a, slots, norm)
    normed = _normed(x, norm)
    xa = torch.einsum("bi,bji->bj", normed, a[slots.long()].to(normed.dtype))
    return xa.masked_fill(slots[:, None] == 0, 0.0).float()


def adapter_up_(y: Tensor, share: RowShare, *, impl: Impl | None = None) -> Tensor:
    """y [B, out] += share, in place, for any number of rows."""
    if use_triton(y, impl):
        from pronghorn.kernels.triton.matvec import up_

        return up_(y, share)
    return y.copy_(y.to(math_dtype(y.dtype)) + _shares(share, math_dtype(y.dtype)))


def _normed(x: Tensor, norm: RowNorm | None) -> Tensor:
    wide = x.to(math_dtype(x.dtype))
    if norm is None:
        return wide
    return F.rms_norm(wide, (x.shape[1],), norm.weight.to(wide.dtype) + norm.offset, norm.eps)


def _shares(share: RowShare, dtype: torch.dtype) -> Tensor:
    """[B, out]."""
    b, rank = share.b[share.slots.long()], share.b.shape[2]
    starts = (0, *share.ends[:-1])
    parts = [
        torch.einsum(
            "bor,br->bo", b[:, start:end].to(dtype), share.xa[:, p * rank : (p + 1) * rank].to(dtype)
        )
        for p, (start, end) in enumerate(zip(starts, share.ends, strict=True))
    ]
    return torch.cat(parts, 1).masked_fill(share.slots[:, None] == 0, 0.0)


def _finished(
    y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    share: RowShare | None,
    residual: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    y = y if bias is None else y + bias.to(y.dtype)
    y = y if share is None else y + _shares(share, y.dtype)
    if activation is not None:
        gate, up = y.chunk(2, 1)
        value = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate=APPROXIMATE[activation])
        y = value * up
    if residual is not None:
        return residual.copy_(y + residual.to(y.dtype))
    return y.to(out_dtype or x.dtype)
