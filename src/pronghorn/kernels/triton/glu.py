"""Gated linear units in Triton: elementwise over a row and a block of columns, one pass each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.triton.launch import unit_rows

BLOCK = 1024


@triton.jit
def _value_and_slope(x, ACTIVATION: tl.constexpr):
    """f(x) and f'(x) in fp32; see `kernels.glu` for the formulas."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        value = x * s
        slope = s + value * (1.0 - s)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # tanh z = 2 σ(2z) - 1
        t = 2.0 * tl.sigmoid(2.0 * inner) - 1.0
        half = 0.5 * (1.0 + t)
        value = x * half
        slope = half + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return value, slope


@triton.jit
def _forward(
    gate_ptr, up_ptr, act_ptr, gate_stride, up_stride, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(gate, ACTIVATION)
    tl.store(act_ptr + row * width + columns, (value * up).to(act_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dact_ptr, gate_ptr, up_ptr, act_ptr, dgate_ptr, dup_ptr,
    dact_stride, gate_stride, up_stride, act_stride, dgate_stride, dup_stride, width,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    # All loads come before the stores, which may go to the same addresses.
    dact = tl.load(dact_ptr + row * dact_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(gate, ACTIVATION)
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    tl.store(act_ptr + row * act_stride + columns, (value * up).to(dtype), mask=inside)
    tl.store(dgate_ptr + row * dgate_stride + columns, (dact * up * slope).to(dtype), mask=inside)
    tl.store(dup_ptr + row * dup_stride + columns, (dact * value).to(dtype), mask=inside)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    gate, up = unit_rows(gate), unit_rows(up)
    rows, width = gate.shape
    act = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    if act.numel():
        _forward[(rows, triton.cdiv(width, BLOCK))](
            gate,
            up,
            act,
            gate.stride(0),
            up.stride(0),
            width,
            ACTIVATION=activation,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return act


def backward(
    dact: Tensor, gate: Tensor, up: Tensor, activation: str, inplace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if inplace:
        if any(x.stride(-1) != 1 for x in (dact, gate, up)):
            raise ValueError("in place needs rows of unit stride")
        outputs = (dact, gate, up)
    else:
        dact, gate, up = unit_rows(dact), unit_rows(gate), unit_rows(up)
        outputs = tuple(torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(3))
    act, dgate, dup = outputs
    rows, width = gate.shape
    if gate.numel():
        _backward[(rows, triton.cdiv(width, BLOCK))](
            dact, gate, up, act, dgate, dup,
            *(x.stride(0) for x in (dact, gate, up, act, dgate, dup)), width,
            ACTIVATION=activation, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return act, dgate, dup
