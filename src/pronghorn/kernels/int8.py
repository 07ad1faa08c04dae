"""8-bit integers with a scale a row, rotated so that no number stands out, and their products.

    x ≈ code · scale,   scale_t = max_i |x_ti| / 127,   code = rint(x / scale)

A number is off by at most half a scale, whatever its own size: less than e4m3 (a sixteenth of the number) for all but
the smallest, as long as rows hold no outliers. Activations do hold some, so rows are turned first, in blocks of 64, by
H: a Hadamard matrix (±1, each row at right angles to the others) over 8, which is its own inverse and spreads one large
number over 64 places (QuaRot: Ashkboos et al. 2024, arXiv 2404.00456). With both factors of a product turned along the
inner axis, the turns cancel: (X H) (W H)ᵀ = X Wᵀ. Widths that 64 does not divide take blocks of 32 or 16.

The matrix units of every NVIDIA GPU since Turing multiply int8 at the rate of e4m3 or better, and add up exactly, in
32 bits:

    Y = (codes @ weight_codesᵀ) · scale · weight_scaleᵀ   [+ s · XA Bᵀ]   [+ residual]

The brackets, an adapter's share (`kernels.lora.LowRank`) and what a layer adds its output to, are added in the same
pass that scales and writes Y.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, multiplies_in_triton, row_block
from pronghorn.kernels.lora import LowRank
from pronghorn.kernels.rms_norm import rms_norm_backward, rms_norm_forward

LARGEST = 127.0
# The scale of a row of zeros; its reciprocal is finite.
TINY = 2.0**-100
#: sizes of the blocks that are turned, best first
ROTATIONS = (64, 32, 16)

#: codes int8 [T, W] and their scales fp32 [T, 1]
Codes = tuple[Tensor, Tensor]


def rotation_of(width: int) -> int:
    """The size of the blocks in which rows of `width` numbers are turned; 0 where none divides it."""
    return next((size for size in ROTATIONS if width > 0 and width % size == 0), 0)


@lru_cache(maxsize=32)
def hadamard(size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The symmetric Hadamard matrix of ±1 (Sylvester's): entry (i, j) is -1 where i & j has an odd number of bits."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix.to(device, dtype)


def rotate(x: Tensor, *, impl: Impl | None = None) -> Tensor:
    """x · H over the last axis, in x's dtype; fp32 inside. Twice gives x again.

    Raises:
        ValueError: where no block divides the width.
    """
    _checked_rotation(x.shape[-1])
    if multiplies_in_triton(x, impl):
        from pronghorn.kernels.triton.int8 import rotate as run

        return run(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    source, target = x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1])
    rows = _step(source)
    for some, into in zip(source.split(rows), target.split(rows), strict=True):
        into.copy_(turned(some.to(torch.float32)))
    return out


def quantise_rows(
    x: Tensor, columns: Tensor | None = None, *, rotated: bool = False, impl: Impl | None = None
) -> Codes:
    """Codes int8 [T, W] and scales fp32 [T, 1] of x, of x · columns, or of x · H.

    A row with a number that is not finite gets a scale that is not finite either, so that products show it.

    Args:
        x: [T, W], rows may be strided. columns: fp32, W elements, or None; not together with `rotated`.
    """
    return quantise_joined((x,), columns, rotated=rotated, impl=impl)


def quantise_joined(
    parts: Sequence[Tensor],
    columns: Tensor | None = None,
    *,
    rotated: bool = False,
    impl: Impl | None = None,
) -> Codes:
    """`quantise_rows` of tensors [T, W_i] side by side, which are nowhere written so: codes [T, ΣW], scales [T, 1].

    Blocks are those of the joined width, `rotation_of(ΣW)`.
    """
    width = sum(part.shape[1] for part in parts)
    if rotated:
        _checked_rotation(width)
        if columns is not None:
            raise ValueError("rows are either turned or multiplied with factors of columns")
    if multiplies_in_triton(parts[0], impl):
        from pronghorn.kernels.triton.int8 import quantise_joined as run

        return run(parts, columns, rotated)
    rows = parts[0].shape[0]
    codes = torch.empty(rows, width, dtype=torch.int8, device=parts[0].device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=parts[0].device)
    step = _step(codes)
    for start in range(0, rows, step):
        wide = torch.cat([part[start : start + step] for part in parts], 1).to(torch.float32)
        if columns is not None:
            wide = wide * columns.view(-1)
        wide = turned(wide) if rotated else wide
        scale = wide.abs().amax(1, keepdim=True).div_(LARGEST).clamp_(min=TINY)
        scales[start : start + step] = scale
        wide = wide.mul_(scale.reciprocal()).round_().nan_to_num_(0.0).clamp_(-LARGEST, LARGEST)
        codes[start : start + step] = wide.to(torch.int8)
    return codes, scales


def quantise_weight(weight: Tensor, *, impl: Impl | None = None) -> Codes:
    """Of W [out, in], for products with turned inputs: codes of W · H [out, in] and scales [out, 1]."""
    return quantise_rows(weight, rotated=True, impl=impl)


def quantise_weight_input_grad(weights: Sequence[Tensor], *, impl: Impl | None = None) -> Codes:
    """Of weights [out_i, in], for products with turned output gradients side by side: codes of Wᵀ · H [in, Σout] and
    scales [in, 1], W being the weights one below the other."""
    inputs, outputs = weights[0].shape[1], sum(weight.shape[0] for weight in weights)
    codes = torch.empty(inputs, outputs, dtype=torch.int8, device=weights[0].device)
    scales = torch.empty(inputs, 1, dtype=torch.float32, device=weights[0].device)
    step = max(16, 2**24 // max(outputs, 1))
    for start in range(0, inputs, step):
        some = torch.cat([weight[:, start : start + step].t() for weight in weights], 1)
        codes[start : start + step], scales[start : start + step] = quantise_rows(
            some, rotated=True, impl=impl
        )
    return codes, scales


def dequantise(
    codes: Tensor, scales: Tensor, dtype: torch.dtype, rotated: bool = True, *, impl: Impl | None = None
) -> Tensor:
    """What codes stand for, in `dtype`: codes · scales, turned back."""
    if rotation_of(codes.shape[1]) and multiplies_in_triton(codes, impl):
        from pronghorn.kernels.triton.int8 import dequantise as run

        return run(codes, scales, dtype, rotated)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    rows = _step(codes)
    for some, scale, into in zip(codes.split(rows), scales.split(rows), out.split(rows), strict=True):
        wide = some.to(torch.float32) * scale
        into.copy_(turned(wide) if rotated else wide)
    return out


def rms_norm_forward_int8(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor, Tensor, Codes]:
    """`kernels.rms_norm.rms_norm_forward`, and y's turned codes [T, H] with their scales, made in the same pass.

    The codes are those of the rounded y: the same as `quantise_rows(y, rotated=True)`.
    """
    _checked_rotation(x.shape[1])
    if multiplies_in_triton(x, impl):
        from pronghorn.kernels.triton.int8_norm import holds, norm_forward

        if holds(x.shape[1]):
            return norm_forward(x, weight, eps, residual, weight_offset)
    y, rstd, summed = rms_norm_forward(
        x, weight, eps, residual=residual, weight_offset=weight_offset, impl=impl
    )
    return y, rstd, summed, quantise_rows(y, rotated=True, impl=impl)


def rms_norm_backward_int8(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor | None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    residual_grad: Tensor | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Codes]:
    """dx [T, H] of `kernels.rms_norm.rms_norm_backward` and its turned codes, those of the rounded dx."""
    _checked_rotation(x.shape[1])
    if multiplies_in_triton(x, impl):
        from pronghorn.kernels.triton.int8_norm import holds, norm_backward

        if holds(x.shape[1]):
            return norm_backward(dy, x, weight, rstd, eps, weight_offset, residual_grad)
    dx, _ = rms_norm_backward(
        dy, x, weight, rstd, eps=eps, weight_offset=weight_offset, residual_grad=residual_grad, impl=impl
    )
    return dx, quantise_rows(dx, rotated=True, impl=impl)


def _step(x: Tensor) -> int:
    """Rows that are worked on at a time, for the sake of temporary memory in fp32."""
    return min(row_block(x), max(1, 2**24 // max(1, x.shape[-1])))


def _checked_rotation(width: int) -> int:
    rotation = rotation_of(width)
    if not rotation:
        raise ValueError(f"rows of {width} numbers cannot be cut into blocks of {ROTATIONS}")
    return rotation


def turned(wide: Tensor, block: int | None = None) -> Tensor:
    """x · H of fp32 rows [T, W]; H's blocks are `rotation_of(W)` unless given."""
    size = rotation_of(wide.shape[1]) if block is None else block
    matrix = hadamard(size, wide.device)
    return (wide.reshape(-1, size) @ matrix).mul_(size**-0.5).view(wide.shape)


def product(
    left: Codes,
    right: Codes,
    *,
    low_rank: LowRank | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """(codes · scales) [T, K] @ (codes · scales)ᵀ [K, N] + low_rank + residual -> [T, N] in `dtype`.

    Sums over K are exact (up to K = 133,000, where 127² · K passes 2³¹); fp32 for the rest; one rounding,
    but for adapters of ranks above 64: those are added after it, with a second.

    Args:
        left: codes [T, K], contiguous along K, and scales [T, 1]. right: codes [N, K], contiguous along K (rows may lie
            further apart: columns of a wider matrix), and scales [N, 1].
        low_rank: an adapter's share; xa [T, R] and b [N, R].
        residual: [T, N], unit stride along N.
        out: written and returned where given, [T, N] in `dtype`, unit stride along N; may be the residual.
    """
    codes, other = left[0], right[0]
    if out is None:
        out = torch.empty(codes.shape[0], other.shape[0], dtype=dtype, device=codes.device)
    if multiplies_in_triton(codes, impl):
        from pronghorn.kernels.triton.gemm8 import product as run

        return run(left, right, low_rank, residual, out)
    wide = _sums(codes, other).to(torch.float32).mul_(left[1]).mul_(right[1].view(1, -1))
    if low_rank is not None:
        wide = low_rank.add_to(wide)
    if residual is not None:
        wide = wide + residual.to(torch.float32)
    return out.copy_(wide)


def _sums(codes: Tensor, other: Tensor) -> Tensor:
    """codes @ otherᵀ, exactly: in int32 by a GPU's library where it takes the sizes, else in fp64."""
    (rows, inner), columns = codes.shape, other.shape[0]
    if codes.is_cuda and rows > 16 and inner % 8 == 0 and columns % 8 == 0:
        return torch._int_mm(codes, other.t())
    return codes.double() @ other.double().t()
