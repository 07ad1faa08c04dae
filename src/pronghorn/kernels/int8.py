"""8-bit integers with a scale a row, and products of 8-bit codes (int8, or e4m3 of `kernels.fp8`).

    x_ti · c_i ≈ code_ti · scale_t,   scale_t = max_i |x_ti · c_i| / 127,   code = rint(x · c / scale)

A number is off by at most half a scale, whatever its own size: less than e4m3 (a sixteenth of the number) for all but
the smallest, where rows hold no outliers. The matrix units of every NVIDIA GPU since Turing multiply int8 at the rate
of e4m3 or better, and add up exactly, in 32 bits:

    Y = (codes @ weight_codesᵀ) · scale · weight_scaleᵀ   [+ s · XA Bᵀ]   [+ residual]

The brackets, an adapter's share (`kernels.lora.LowRank`) and what a layer adds its output to, are added in the same
pass that scales and writes Y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, use_triton
from pronghorn.kernels.fp8 import TINY
from pronghorn.kernels.lora import LowRank

LARGEST = 127.0

#: codes int8 or e4m3 [T, W] and their scales fp32 [T, 1]
Codes = tuple[Tensor, Tensor]


def quantise_rows(x: Tensor, columns: Tensor | None = None, *, impl: Impl | None = None) -> Codes:
    """Codes int8 [T, W] and scales fp32 [T, 1] of x · columns.

    A row with a number that is not finite gets a scale that is not finite either, so that products show it.

    Args:
        x: [T, W], rows may be strided. columns: fp32, W elements, or None.
    """
    if use_triton(x, impl):
        from pronghorn.kernels.triton.int8 import quantise_rows as run

        return run(x, columns)
    wide = x.to(torch.float32)
    wide = wide if columns is None else wide * columns.view(-1)
    scales = (wide.abs().amax(1, keepdim=True) / LARGEST).clamp(min=TINY)
    codes = (wide / scales).round_().nan_to_num_(0.0).clamp_(-LARGEST, LARGEST)
    return codes.to(torch.int8), scales


def product(
    left: Codes,
    right: Codes,
    *,
    low_rank: LowRank | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    impl: Impl | None = None,
) -> Tensor:
    """(codes · scales) [T, K] @ (codes · scales)ᵀ [K, N] + low_rank + residual -> [T, N] in `dtype`.

    Sums over K are exact for int8 (up to K = 133,000, where 127² · K passes 2³¹), fp32 for the rest; one rounding.

    Args:
        left: codes [T, K], contiguous along K, and scales [T, 1]. right: codes [N, K] of the same dtype, contiguous
            along K, and scales [N, 1].
        low_rank: an adapter's share; xa [T, R] and b [N, R].
        residual: [T, N], unit stride along N.
    """
    codes, other = left[0], right[0]
    if use_triton(codes, impl):
        from pronghorn.kernels.triton.gemm8 import product as run

        return run(left, right, low_rank, residual, dtype)
    wide = torch.float64 if codes.dtype == torch.int8 else torch.float32
    out = (codes.to(wide) @ other.to(wide).t()).to(torch.float32) * left[1] * right[1].view(1, -1)
    if low_rank is not None:
        out = low_rank.add_to(out)
    if residual is not None:
        out = out + residual.to(torch.float32)
    return out.to(dtype)
