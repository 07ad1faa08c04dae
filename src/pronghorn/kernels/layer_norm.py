"""LayerNorm without a bias (Ba et al. 2016, arXiv 1607.06450), of whole rows or of heads with weights of their own.

    y = x̂ · w,   x̂ = (x - mean_h x) · rstd,   rstd = (mean_h (x - mean_h x)² + eps)^-½

With g = dy · w:

    dx = rstd · (g - mean_h g - x̂ · mean_h(g · x̂)) + residual_grad,   dw = Σ_t dy · x̂

The weight is [H], or [G, H] where row t takes the weight t mod G. Arithmetic is fp32 (fp64 for fp64 inputs) up to one
rounding of each output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pronghorn.kernels.dispatch import Impl, math_dtype, row_block, use_triton


def layer_norm_forward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out_dtype: torch.dtype | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """y [T, H] in `out_dtype` (None: x's) for rows x [T, H]."""
    dtype = out_dtype or x.dtype
    if use_triton(x, impl):
        from pronghorn.kernels.triton.layer_norm import forward

        return forward(x, weight, eps, dtype)
    y = torch.empty_like(x, dtype=dtype)
    scale = weight.to(math_dtype(x.dtype))
    for at in _blocks(x, weight):
        normed, _ = _normalised(x[at], eps)
        y[at] = _by_weight(normed, scale)
    return y


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    residual_grad: Tensor | None = None,
    need_weight_grad: bool = False,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx [T, H] in x's dtype, with `residual_grad` [T, H] added before the rounding; dweight in fp32 and the weight's
    shape, or None."""
    if use_triton(x, impl):
        from pronghorn.kernels.triton.layer_norm import backward

        return backward(dy, x, weight, eps, residual_grad, need_weight_grad)
    dtype = math_dtype(x.dtype)
    scale = weight.to(dtype)
    dx = torch.empty_like(x)
    dweight = x.new_zeros(weight.shape, dtype=dtype) if need_weight_grad else None
    for at in _blocks(x, weight):
        normed, rstd = _normalised(x[at], eps)
        grad = dy[at].to(dtype)
        if dweight is not None:
            dweight += (grad * normed).view(-1, *weight.shape).sum(0)
        grad = _by_weight(grad, scale)
        along = (grad * normed).mean(1, keepdim=True)
        grad = grad.sub_(grad.mean(1, keepdim=True)).addcmul_(normed, along, value=-1).mul_(rstd)
        dx[at] = grad if residual_grad is None else grad.add_(residual_grad[at])
    return dx, dweight


def _blocks(x: Tensor, weight: Tensor) -> list[slice]:
    """Rows in blocks (`kernels.dispatch.row_block`) that begin with the first of the weights."""
    groups = weight.numel() // weight.shape[-1]
    rows = max(groups, row_block(x) // groups * groups)
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x̂ [rows, H] and rstd [rows, 1] in the dtype of arithmetic."""
    wide = x.to(math_dtype(x.dtype))
    centred = wide - wide.mean(1, keepdim=True)
    rstd = centred.square().mean(1, keepdim=True).add_(eps).rsqrt_()
    return centred.mul_(rstd), rstd


def _by_weight(x: Tensor, scale: Tensor) -> Tensor:
    """Rows by the weights that they take in turn."""
    return (x.view(-1, *scale.shape) * scale).view(x.shape)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return layer_norm_forward(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx, dweight = layer_norm_backward(
            grads[0].contiguous(), x, weight, eps=ctx.eps, need_weight_grad=ctx.needs_input_grad[1]
        )
        return dx, None if dweight is None else dweight.to(weight.dtype), None


def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Differentiable LayerNorm of rows [T, H]."""
    return _LayerNorm.apply(x, weight, eps)
