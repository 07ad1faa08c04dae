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

from pronghorn.kernels.dispatch import Impl, math_dtype, row_block, use_triton
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
    dtype, rows = math_dtype(x.dtype), row_block(x)
    scale = weight.to(dtype) + weight_offset
    y = torch.empty_like(summed, dtype=out_dtype or x.dtype)
    rstd = summed.new_empty(summed.shape[0], 1, dtype=dtype)
    work = summed.new_empty(2, rows, x.shape[1], dtype=dtype)
    for source, target, row_rstd in zip(summed.split(rows), y.split(rows), rstd.split(rows), strict=True):
        wide, squares = (buffer[: source.shape[0]] for buffer in work)
        row_rstd.copy_(_rstd(wide.copy_(source), eps, squares))
        target.copy_(wide.mul_(row_rstd).mul_(scale))
    return y, rstd.squeeze(1), summed


def _rstd(wide: Tensor, eps: float, work: Tensor) -> Tensor:
    """(mean_h x² + eps)^-½ of rows [T, H], as [T, 1]; `work` is overwritten."""
    return torch.square(wide, out=work).mean(1, keepdim=True).add_(eps).rsqrt_()


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
    dtype, rows = math_dtype(x.dtype), row_block(x)
    scale = weight.to(dtype) + weight_offset
    dx = torch.empty_like(x)
    dweight = x.new_zeros(x.shape[1], dtype=dtype) if need_weight_grad else None
    work = x.new_empty(3, rows, x.shape[1], dtype=dtype)
    for at in (slice(start, start + rows) for start in range(0, x.shape[0], rows)):
        normed, grad, product = (buffer[: x[at].shape[0]] for buffer in work)
        normed.copy_(x[at])
        row_rstd = _rstd(normed, eps, product) if rstd is None else rstd[at, None]
        normed.mul_(row_rstd)
        grad.copy_(dy[at])
        if dweight is not None:
            dweight += torch.mul(grad, normed, out=product).sum(0)
        grad.mul_(scale)
        along = torch.mul(grad, normed, out=product).mean(1, keepdim=True)
        grad.addcmul_(normed, along, value=-1).mul_(row_rstd)
        dx[at] = grad if residual_grad is None else grad.add_(residual_grad[at])
    return dx, dweight


def rms_norm_backward_fp8(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor | None,
    columns: Tensor,
    *,
    eps: float,
    weight_offset: float = 0.0,
    residual_grad: Tensor | None = None,
    need_weight_grad: bool = False,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor | None, Fp8Rows]:
    """`rms_norm_backward`, and the e4m3 codes [T, H] of the rounded dx · columns with their scales [T, 1].

    Args:
        columns: factors of dx's columns, as for `kernels.fp8.quantise_rows`.
    """
    if use_triton(x, impl):
        from pronghorn.kernels.triton.rms_norm import backward

        codes = torch.empty(x.shape, dtype=E4M3, device=x.device)
        scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
        made = (codes, scales, columns.contiguous().view(-1))
        dx, dweight = backward(dy, x, weight, rstd, eps, weight_offset, residual_grad, need_weight_grad, made)
        return dx, dweight, (codes, scales)
    dx, dweight = rms_norm_backward(
        dy,
        x,
        weight,
        rstd,
        eps=eps,
        weight_offset=weight_offset,
        residual_grad=residual_grad,
        need_weight_grad=need_weight_grad,
        impl="torch",
    )
    return dx, dweight, quantise_rows(dx, columns, impl="torch")


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
