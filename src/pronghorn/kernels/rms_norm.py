"""RMSNorm with an optional residual sum (Zhang & Sennrich 2019, arXiv 1910.07467).

    y = x · rstd · (w + offset),   rstd = (mean_h x² + eps)^-½

With g = dy · (w + offset) and x̂ = x · rstd:

    dx = rstd · (g - x̂ · mean_h(g · x̂)) + residual_grad,   dw = Σ_t dy · x̂

Arithmetic is fp32 (fp64 for fp64 inputs) up to one rounding of each output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pronghorn.kernels.dispatch import Impl, math_dtype, use_triton
from pronghorn.kernels.fp8 import E4M3, Fp8Rows, quantise_rows


def rms_norm_forward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise rows, after adding a residual if one is given.

    Args:
        x: [T, H]. residual: [T, H] in x's dtype or None. weight: [H].
        out_dtype: of y; None means x's.

    Returns:
        y [T, H]; rstd fp32 [T]; summed [T, H]: x + residual rounded to x's dtype (y normalises the rounded sum), or
        x itself without a residual.
    """
    if use_triton(x, impl):
        from pronghorn.kernels.triton.rms_norm import forward

        return forward(x, weight, eps, residual, weight_offset, out_dtype or x.dtype)
    summed = x if residual is None else x + residual
    wide = summed.to(math_dtype(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = (wide * rstd[:, None]).mul_(weight.to(wide.dtype) + weight_offset)
    return y.to(out_dtype or x.dtype), rstd.to(math_dtype(x.dtype)), summed


def rms_norm_forward_fp8(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor, Tensor, Fp8Rows]:
    """`rms_norm_forward`, and y's e4m3 codes [T, H] with their scales [T, 1], made in the same pass.

    The codes are those of the rounded y: the same as `kernels.fp8.quantise_rows(y)`.
    """
    dtype = out_dtype or x.dtype
    if use_triton(x, impl):
        from pronghorn.kernels.triton.rms_norm import forward

        codes = torch.empty(x.shape, dtype=E4M3, device=x.device)
        scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
        y, rstd, summed = forward(x, weight, eps, residual, weight_offset, dtype, (codes, scales))
        return y, rstd, summed, (codes, scales)
    y, rstd, summed = rms_norm_forward(
        x, weight, eps, residual=residual, weight_offset=weight_offset, out_dtype=dtype, impl="torch"
    )
    return y, rstd, summed, quantise_rows(y, impl="torch")


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor | None,
    *,
    eps: float,
    weight_offset: float = 0.0,
    residual_grad: Tensor | None = None,
    need_weight_grad: bool = False,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of RMSNorm; `x` is what was normalised (the rounded sum), `rstd` None recomputes it.

    Returns:
        dx [T, H] in x's dtype, with `residual_grad` [T, H] added before the rounding; dweight fp32 [H] or None.
    """
    if use_triton(x, impl):
        from pronghorn.kernels.triton.rms_norm import backward

        return backward(dy, x, weight, rstd, eps, weight_offset, residual_grad, need_weight_grad)
    wide = x.to(math_dtype(x.dtype))
    if rstd is None:
        rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    normed = wide * rstd[:, None]
    grad = dy.to(wide.dtype)
    dweight = (grad * normed).sum(0) if need_weight_grad else None
    scaled = grad * (weight.to(wide.dtype) + weight_offset)
    along = (scaled * normed).mean(-1, keepdim=True)
    dx = scaled.addcmul_(normed, along, value=-1).mul_(rstd[:, None])
    if residual_grad is not None:
        dx += residual_grad
    return dx.to(x.dtype), dweight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
        y, rstd, _ = rms_norm_forward(x, weight, eps, weight_offset=weight_offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps, ctx.weight_offset = eps, weight_offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_norm_backward(
            grads[0].contiguous(),
            x,
            weight,
            rstd,
            eps=ctx.eps,
            weight_offset=ctx.weight_offset,
            need_weight_grad=ctx.needs_input_grad[1],
        )
        return dx, None if dweight is None else dweight.to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """Differentiable RMSNorm of rows [T, H]."""
    return _RMSNorm.apply(x, weight, eps, weight_offset)
