"""Gated linear units (Shazeer 2020, arXiv 2002.05202): act = f(gate) · up with f one of SiLU, GELU, tanh-GELU.

    dgate = dact · up · f'(gate),   dup = dact · f(gate)

Backward rebuilds act in the same pass, since the down projection's gradients need it and nothing keeps it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, math_dtype, use_triton

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
GELU_TANH = math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715


def glu_forward(gate: Tensor, up: Tensor, activation: str, *, impl: Impl | None = None) -> Tensor:
    """act [T, I] of gate and up [T, I], which may be column slices of a wider buffer (rows strided)."""
    _check(activation)
    if use_triton(gate, impl):
        from pronghorn.kernels.triton.glu import forward

        return forward(gate, up, activation)
    wide = gate.to(math_dtype(gate.dtype))
    value, _ = _value_and_slope(wide, activation, slope=False)
    return value.mul_(up).to(gate.dtype)


def glu_backward(
    dact: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    *,
    inplace: bool = False,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(act, dgate, dup), each [T, I]; with `inplace` written over dact, gate and up, in this order."""
    _check(activation)
    if use_triton(gate, impl):
        from pronghorn.kernels.triton.glu import backward

        return backward(dact, gate, up, activation, inplace)
    wide = gate.to(math_dtype(gate.dtype))
    value, slope = _value_and_slope(wide, activation)
    grad, above = dact.to(wide.dtype), up.to(wide.dtype)
    act = (value * above).to(gate.dtype)
    dgate = slope.mul_(above).mul_(grad).to(gate.dtype)
    dup = value.mul_(grad).to(gate.dtype)
    if inplace:
        return dact.copy_(act), gate.copy_(dgate), up.copy_(dup)
    return act, dgate, dup


def _check(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation '{activation}' is not one of {', '.join(ACTIVATIONS)}")


def _value_and_slope(x: Tensor, activation: str, slope: bool = True) -> tuple[Tensor, Tensor]:
    """f(x) and f'(x) as new tensors; without `slope` the second is x."""
    if activation == "silu":
        s = torch.sigmoid(x)
        value = x * s
        # f' = s + x s (1 - s) = s + f (1 - s)
        return value, (torch.addcmul(s, value, 1 - s) if slope else x)
    if activation == "gelu":
        cdf = torch.special.ndtr(x)
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return x * cdf, (torch.addcmul(cdf, x, density) if slope else x)
    t = torch.tanh(GELU_TANH * (x + GELU_CUBIC * x**3))
    half = 0.5 * (1 + t)
    if not slope:
        return x * half, x
    inner = GELU_TANH * (1 + 3 * GELU_CUBIC * x * x)
    return x * half, half + 0.5 * x * (1 - t * t) * inner
