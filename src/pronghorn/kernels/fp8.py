"""8-bit floating point (e4m3: Micikevicius et al. 2022, arXiv 2209.05433): rows as codes with one scale each.

    scale_t = max_i |x_ti · c_i| / 448,   code_ti = round_e4m3(x_ti · c_i / scale_t),   x · c ≈ code · scale

e4m3 keeps 3 bits after the point: a number at least 2⁻¹⁴·¹ of its row's largest is off by at most 1/16 of itself,
a smaller one by at most 2⁻¹⁰ · scale. The column factors c (1 where none are given) carry the row scales of a weight
into the input gradient: dy @ (s ⊙ codes) = (dy · s) @ codes, so that one set of codes serves both directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, use_triton

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# A row of zeros, or of numbers that fp32 cannot divide, gets this scale: its codes are zeros.
TINY = 2.0**-100


def quantise_rows(
    x: Tensor, columns: Tensor | None = None, *, impl: Impl | None = None
) -> tuple[Tensor, Tensor]:
    """Codes e4m3 [T, W] and scales fp32 [T, 1] of x · columns.

    Args:
        x: [T, W], rows may be strided. columns: fp32 [W] or None.
    """
    if use_triton(x, impl):
        from pronghorn.kernels.triton.fp8 import quantise_rows as run

        return run(x, columns)
    wide = x.to(torch.float32)
    if columns is not None:
        wide = wide * columns
    scales = (wide.abs().amax(1, keepdim=True) / E4M3_MAX).clamp_(min=TINY)
    return (wide / scales).to(E4M3), scales
