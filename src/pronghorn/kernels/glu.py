"""Gated linear units (Shazeer 2020, arXiv 2002.05202): act = f(gate) · up with f one of SiLU, GELU, tanh-GELU.

    dgate = dact · up · f'(gate),   dup = dact · f(gate)

Backward rebuilds act in the same pass, since the down projection's gradients need it and nothing keeps it.

gate and up may come without their adapters' share, which is then added in fp32 on the way in: gate + s · XA Bᵀ. The
frozen products are so written and read once, and nobody adds to them in between.

For a consumer that turns its input into 8-bit codes with a scale a row, `row_max` [T] fp32 takes in the rows' largest
magnitudes, of the numbers as they are rounded here: row_max = max(row_max, ·), so the caller fills it with zeros.
`exponents` (int8, -126 to 127, [I] of gate's columns and of up's) are such a consumer's scales of the columns:
|dgate · 2^e| and |dup · 2^e| are then what is compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, math_dtype, row_block, use_triton
from pronghorn.kernels.lora import LowRank, accumulate_product_

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
#: torch's names of the two GELUs
APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}

aten = torch.ops.aten


def glu_forward(
    gate: Tensor,
    up: Tensor,
    activation: str,
    *,
    gate_adapter: LowRank | None = None,
    up_adapter: LowRank | None = None,
    row_max: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """act [T, I] of gate and up [T, I], which may be column slices of a wider buffer (rows strided).

    With `gate_adapter` and `up_adapter` the shares that gate and up lack are added before anything else.
    """
    _check(activation)
    if use_triton(gate, impl):
        from pronghorn.kernels.triton.glu import forward

        return forward(gate, up, activation, gate_adapter, up_adapter, row_max)
    out, rows = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device), row_block(gate)
    work = gate.new_empty(2, rows, gate.shape[1], dtype=math_dtype(gate.dtype))
    for at in (slice(start, start + rows) for start in range(0, gate.shape[0], rows)):
        value = _value_(_whole_(work[0], gate, gate_adapter, at), activation)
        out[at] = value.mul_(_whole_(work[1], up, up_adapter, at))
        if row_max is not None:
            _keep_max_(row_max[at], out[at], None)
    return out


def glu_backward(
    dact: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    *,
    gate_adapter: LowRank | None = None,
    up_adapter: LowRank | None = None,
    inplace: bool = False,
    row_max: Tensor | None = None,
    exponents: tuple[Tensor, Tensor] | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(act, dgate, dup), each [T, I]; with `inplace` written over dact, gate and up, in this order."""
    _check(activation)
    if use_triton(gate, impl):
        from pronghorn.kernels.triton.glu import backward

        return backward(dact, gate, up, activation, gate_adapter, up_adapter, inplace, row_max, exponents)
    outs = (dact, gate, up) if inplace else tuple(torch.empty_like(x) for x in (dact, gate, up))
    rows = row_block(gate)
    work = gate.new_empty(4, rows, gate.shape[1], dtype=math_dtype(gate.dtype))
    for at in (slice(start, start + rows) for start in range(0, gate.shape[0], rows)):
        act, dgate, dup = (out[at] for out in outs)
        wide, above = _whole_(work[0], gate, gate_adapter, at), _whole_(work[1], up, up_adapter, at)
        grad = work[2][: act.shape[0]].copy_(dact[at])
        slope = torch.mul(grad, above, out=work[3][: act.shape[0]])
        dgate.copy_(_times_slope_(slope, wide, activation))
        value = _value_(wide, activation)
        act.copy_(above.mul_(value))
        dup.copy_(grad.mul_(value))
        if row_max is not None:
            for out, exponent in zip((dgate, dup), exponents or (None, None), strict=True):
                _keep_max_(row_max[at], out, exponent)
    return outs[0], outs[1], outs[2]


def glu_forward_down(
    gate: Tensor,
    up: Tensor,
    activation: str,
    a: Tensor,
    *,
    gate_adapter: LowRank | None = None,
    up_adapter: LowRank | None = None,
    row_max: Tensor | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """`glu_forward` and the down projection's XA = act · aᵀ [T, R] for a [R, I], where act is at hand."""
    _check(activation)
    if use_triton(gate, impl):
        from pronghorn.kernels.triton.glu_down import forward

        return forward(gate, up, activation, a, gate_adapter, up_adapter, row_max)
    act = glu_forward(
        gate, up, activation, gate_adapter=gate_adapter, up_adapter=up_adapter, row_max=row_max, impl=impl
    )
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
    row_max: Tensor | None = None,
    exponents: tuple[Tensor, Tensor] | None = None,
    impl: Impl | None = None,
) -> None:
    """gate and up [T, I] become their gradients for dact + dxa · a; a_grad [R, I] fp32 += dxaᵀ · act.

    dact [T, I] is the frozen product's input gradient, dxa [T, R] and a [R, I] give the adapter's share of it. For a
    down projection whose only use of act in backward is its adapter's gradient of A: act is not written at all.
    """
    _check(activation)
    if use_triton(gate, impl):
        from pronghorn.kernels.triton.glu_down import backward

        backward(dact, gate, up, activation, dxa, a, a_grad, gate_adapter, up_adapter, row_max, exponents)
        return
    whole = torch.addmm(dact, dxa, a)
    act, dgate, dup = glu_backward(
        whole,
        gate,
        up,
        activation,
        gate_adapter=gate_adapter,
        up_adapter=up_adapter,
        row_max=row_max,
        exponents=exponents,
        impl=impl,
    )
    accumulate_product_(a_grad, dxa.t(), act)
    gate.copy_(dgate)
    up.copy_(dup)


def _whole_(work: Tensor, base: Tensor, adapter: LowRank | None, at: slice) -> Tensor:
    """Rows `at` of base with their adapter's share, in the dtype of arithmetic, written into `work`."""
    rows = base[at]
    out = work[: rows.shape[0]]
    return out.copy_(rows if adapter is None else adapter.rows(at).add_to(rows))


def _keep_max_(row_max: Tensor, out: Tensor, exponent: Tensor | None) -> None:
    """row_max [rows] = max(row_max, |out · 2^exponent| over the columns)."""
    if out.numel():
        size = out.abs().float()
        if exponent is not None:
            size = torch.ldexp(size, exponent)
        torch.maximum(row_max, size.amax(1), out=row_max)


def _check(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation '{activation}' is not one of {', '.join(ACTIVATIONS)}")


def _value_(x: Tensor, activation: str) -> Tensor:
    """f(x), written over x."""
    if activation == "silu":
        return torch.nn.functional.silu(x, inplace=True)
    return aten.gelu_(x, approximate=APPROXIMATE[activation])


def _times_slope_(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """grad · f'(x), written over grad."""
    if activation == "silu":
        return aten.silu_backward.grad_input(grad, x, grad_input=grad)
    return aten.gelu_backward.grad_input(grad, x, approximate=APPROXIMATE[activation], grad_input=grad)
