"""Decay and step size of the gated delta rule, per token and head (Gated Delta Networks, arXiv 2412.06464).

    g = -exp(A_log) · softplus(a + dt_bias)   (the state is multiplied by exp(g)),   β = σ(b)

A few numbers a token, so plain torch everywhere. g and β are fp32 (fp64 for fp64 inputs). N heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pronghorn.kernels.dispatch import math_dtype


def delta_gates_forward(a: Tensor, b: Tensor, decay: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """g and β [T, N] of a, b [T, N], decay (A_log) and dt_bias [N]."""
    wide = math_dtype(a.dtype)
    return -decay.to(wide).exp() * softplus(a.to(wide) + dt_bias.to(wide)), b.to(wide).sigmoid()


def delta_gates_backward(
    dg: Tensor, dbeta: Tensor, a: Tensor, b: Tensor, decay: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a and b [T, N] in their dtype, and of decay and dt_bias [N] in that of g."""
    g, beta = delta_gates_forward(a, b, decay, dt_bias)
    through = -decay.to(g.dtype).exp() * torch.sigmoid(a.to(g.dtype) + dt_bias.to(g.dtype)) * dg
    return through.to(a.dtype), (dbeta * beta * (1 - beta)).to(b.dtype), (dg * g).sum(0), through.sum(0)
