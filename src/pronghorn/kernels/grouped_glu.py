"""The gated unit of routed experts, with each row's routing weight: act[s] = w[s] · f(gate[s]) · g(up[s]).

The weight stands before the down projection, which is linear, so that the experts' outputs are only added up and its
gradient needs no output again:

    dw[s] = Σ_i dact[s, i] · f(gate) · g(up),   dgate = dact · w · g(up) · f'(gate),   dup = dact · w · f(gate) · g'(up)

Activations are those of `kernels.glu` (g(u) = u), and "clamped_swiglu" of gpt-oss: with a limit L and α

    f(x) = min(x, L) · σ(α · min(x, L)),   g(u) = clamp(u, -L, L) + 1

gate and up are the two halves of one tensor [S, 2I], or its even and its odd columns (`interleaved`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, math_dtype, row_block, use_triton
from pronghorn.kernels.glu import APPROXIMATE

CLAMPED = "clamped_swiglu"
aten = torch.ops.aten


@dataclass(frozen=True)
class Gating:
    """What is computed of gate and up; `alpha` and `limit` are the clamped unit's."""

    activation: str
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = float("inf")

    def split(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """gate and up [S, I], views of [S, 2I]."""
        if self.interleaved:
            return gate_up[:, ::2], gate_up[:, 1::2]
        half = gate_up.shape[1] // 2
        return gate_up[:, :half], gate_up[:, half:]


def grouped_glu_forward(
    gate_up: Tensor, weights: Tensor, gating: Gating, *, impl: Impl | None = None
) -> Tensor:
    """act [S, I] in gate_up's dtype; gate_up [S, 2I], weights [S] fp32."""
    if use_triton(gate_up, impl):
        from pronghorn.kernels.triton.grouped_glu import forward

        return forward(gate_up, weights, gating)
    wide = math_dtype(gate_up.dtype)
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    rows = row_block(gate_up)
    for at in (slice(start, start + rows) for start in range(0, gate_up.shape[0], rows)):
        gate, up = (part.to(wide) for part in gating.split(gate_up[at]))
        out[at] = _gate(gate, gating)[0] * _linear(up, gating)[0] * weights[at, None]
    return out


def grouped_glu_backward_(
    dact: Tensor, gate_up: Tensor, weights: Tensor, gating: Gating, *, impl: Impl | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(act, dgate_up, dweights): act written over dact [S, I], dgate_up over gate_up [S, 2I]; dweights [S] fp32."""
    if use_triton(gate_up, impl):
        from pronghorn.kernels.triton.grouped_glu import backward_

        return backward_(dact, gate_up, weights, gating)
    wide = math_dtype(gate_up.dtype)
    dweights = torch.empty(gate_up.shape[0], dtype=wide, device=gate_up.device)
    rows = row_block(gate_up)
    for at in (slice(start, start + rows) for start in range(0, gate_up.shape[0], rows)):
        gate, up = gating.split(gate_up[at])
        value, slope = _gate(gate.to(wide), gating)
        linear, inside = _linear(up.to(wide), gating)
        grad, scale = dact[at].to(wide), weights[at, None]
        product = value * linear
        dweights[at] = (grad * product).sum(1)
        grad = grad * scale
        gate.copy_(grad * linear * slope)
        up.copy_(grad * value * inside)
        dact[at] = product * scale
    return dact, gate_up, dweights


def _gate(x: Tensor, gating: Gating) -> tuple[Tensor, Tensor]:
    """f(x) and f'(x)."""
    ones = torch.ones_like(x)
    if gating.activation == CLAMPED:
        x, inside = x.clamp(max=gating.limit), (x <= gating.limit).to(x.dtype)
        sigmoid = torch.sigmoid(gating.alpha * x)
        return x * sigmoid, sigmoid * (1 + gating.alpha * x * (1 - sigmoid)) * inside
    if gating.activation == "silu":
        return torch.nn.functional.silu(x), aten.silu_backward(ones, x)
    approximate = APPROXIMATE[gating.activation]
    return aten.gelu(x, approximate=approximate), aten.gelu_backward(ones, x, approximate=approximate)


def _linear(x: Tensor, gating: Gating) -> tuple[Tensor, Tensor | float]:
    """g(x) and g'(x)."""
    if gating.activation != CLAMPED:
        return x, 1.0
    return x.clamp(-gating.limit, gating.limit) + 1, (x.abs() <= gating.limit).to(x.dtype)
