"""Gated linear units (Shazeer 2020, arXiv 2002.05202): act = f(gate) · up with f one of SiLU, GELU, tanh-GELU.

    dgate = dact · up · f'(gate),   dup = dact · f(gate)

Backward rebuilds act in the same pass, since the down projection's gradients need it and nothing keeps it.

gate and up may come without their adapters' share, which is then added in fp32 on the way in: gate + s · XA Bᵀ. The
frozen products are so written and read once, and nobody adds to them in between.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, math_dtype, use_triton
from pronghorn.kernels.lora import LowRank, accumulate_product_

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
GELU_TANH = math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715


def glu_forward(
    gate: Tensor,
    up: Tensor,
    activation: str,
    *,
    gate_adapter: LowRank | None = None,
    up_adapter: LowRank | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """act [T, I] of gate and up [T, I], which may be column slices of a wider buffer (rows strided).

    With `gate_adapter` and `up_adapter` the shares that gate and up lack are added before anything else.
    """
    _check(activation)
    if use_triton(gate, impl):
        from pronghorn.kernels.triton.glu import forward

        return forward(gate, up, activation, gate_adapter, up_adapter)
    value, _ = _value_and_slope(_whole(gate, gate_adapter), activation, slope=False)
    return value.mul_(_whole(up, up_adapter)).to(gate.dtype)


def glu_backward(
    dact: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    *,
    gate_adapter: LowRank | None = None,
    up_adapter: LowRank | None = None,
    inplace: bool = False,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(act, dgate, dup), each [T, I]; with `inplace` written over dact, gate and up, in this order."""
    _check(activation)
    if use_triton(gate, impl):
        from pronghorn.kernels.triton.glu import backward

        return backward(dact, gate, up, activation, gate_adapter, up_adapter, inplace)
    wide, above = _whole(gate, gate_adapter), _whole(up, up_adapter)
    value, slope = _value_and_slope(wide, activation)
    grad = dact.to(wide.dtype)
    act = (value * above).to(gate.dtype)
    dgate = slope.mul_(above).mul_(grad).to(gate.dtype)
    dup = value.mul_(grad).to(gate.dtype)
    if inplace:
        return dact.copy_(act), gate.copy_(dgate), up.copy_(dup)
    return act, dgate, dup


def glu_forward_down(
    gate: Tensor,
    up: Tensor,
    activation: str,
    a: Tensor,
    *,
    gate_adapter: LowRank | None = None,
    up_adapter: LowRank | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """`glu_forward` and the down projection's XA = act · aᵀ [T, R] for a [R, I], where act is at hand."""
    _check(activation)
    if use_triton(gate, impl):
        from pronghorn.kernels.triton.glu_down import forward

        return forward(gate, up, activation, a, gate_adapter, up_adapter)
    act = glu_forward(gate, up, activation, gate_adapter=gate_adapter, up_adapter=up_adapter, impl=impl)
    return act, act @ a.t()


def glu_backward_down_(
    dact: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    dxa: Tensor,
    a: Tensor,
    a_grad: Tensor,
    *,
    gate_adapter: LowRank | None = None,
    up_adapter: LowRank | None = None,
    impl: Impl | None = None,
) -> None:
    """gate and up [T, I] become their gradients for dact + dxa · a; a_grad [R, I] fp32 += dxaᵀ · act.

    dact [T, I] is the frozen product's input gradient, dxa [T, R] and a [R, I] give the adapter's share of it. For a
    down projection whose only use of act in backward is its adapter's gradient of A: act is not written at all.
    """
    _check(activation)
    if use_triton(gate, impl):
        from pronghorn.kernels.triton.glu_down import backward

        backward(dact, gate, up, activation, dxa, a, a_grad, gate_adapter, up_adapter)
        return
    whole = torch.addmm(dact, dxa, a)
    act, dgate, dup = glu_backward(
        whole, gate, up, activation, gate_adapter=gate_adapter, up_adapter=up_adapter, impl=impl
    )
    accumulate_product_(a_grad, dxa.t(), act)
    gate.copy_(dgate)
    up.copy_(dup)


def _whole(base: Tensor, adapter: LowRank | None) -> Tensor:
    """base with its adapter's share, in the dtype of arithmetic; never written to."""
    return base.to(math_dtype(base.dtype)) if adapter is None else adapter.add_to(base)


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
