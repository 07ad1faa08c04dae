"""What lies between an attention and its o-projection where a gate does: with or without a norm of each head.

    y = out · σ(gate)                                      Qwen3-Next's and Qwen3.5's full attention
    y = w · out / rms(out) · silu(gate)                    their linear attention; rms over a head's F elements

Only `out` and `gate` are needed in backward. Arithmetic is fp32 (fp64 for fp64 inputs), one rounding at the end. N
heads of F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, math_dtype, use_triton


def gated_output_forward(
    out: Tensor, gate: Tensor, *, weight: Tensor | None = None, eps: float = 0.0, impl: Impl | None = None
) -> Tensor:
    """y [T, N, F] of out and gate [T, N, F], both contiguous; with `weight` [F] the second formula, else the first."""
    if use_triton(out, impl):
        from pronghorn.kernels.triton.gated_output import forward

        return forward(out, gate, weight, eps)
    wide, g = out.to(math_dtype(out.dtype)), gate.to(math_dtype(out.dtype))
    if weight is None:
        return (wide * g.sigmoid()).to(out.dtype)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight.to(wide.dtype) * g * g.sigmoid()).to(out.dtype)


def gated_output_backward(
    dy: Tensor,
    out: Tensor,
    gate: Tensor,
    *,
    weight: Tensor | None = None,
    eps: float = 0.0,
    need_weight_grad: bool = False,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of out and gate [T, N, F], and of the weight in fp32 (None unless `need_weight_grad`)."""
    if use_triton(out, impl):
        from pronghorn.kernels.triton.gated_output import backward

        return backward(dy, out, gate, weight, eps, need_weight_grad)
    wide = math_dtype(out.dtype)
    d, x, g = dy.to(wide), out.to(wide), gate.to(wide)
    s = g.sigmoid()
    if weight is None:
        return (d * s).to(out.dtype), (d * x * s * (1 - s)).to(gate.dtype), None
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed, w = x * rstd, weight.to(wide)
    dnormed = d * g * s
    along = dnormed * w
    dx = rstd * (along - normed * (along * normed).mean(-1, keepdim=True))
    dgate = d * normed * w * s * (1 + g * (1 - s))
    dweight = (dnormed * normed).sum((0, 1)) if need_weight_grad else None
    return dx.to(out.dtype), dgate.to(gate.dtype), dweight
