"""The experts' gated unit in Triton, one row a program: see `kernels.grouped_glu`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.grouped_glu import CLAMPED, Gating
from pronghorn.kernels.triton.glu import value_and_slope


@triton.jit
def _parts(gate, up, alpha, limit, ACTIVATION: tl.constexpr, CLAMP: tl.constexpr):
    """f(gate), f'(gate), g(up), g'(up) in fp32."""
    if CLAMP:
        inside = gate <= limit
        gate = tl.minimum(gate, limit)
        sigmoid = tl.sigmoid(alpha * gate)
        value = gate * sigmoid
        slope = tl.where(inside, sigmoid * (1.0 + alpha * gate * (1.0 - sigmoid)), 0.0)
        linear = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        return value, slope, linear, tl.where(tl.abs(up) <= limit, 1.0, 0.0)
    value, slope = value_and_slope(gate, ACTIVATION)
    return value, slope, up, tl.full(up.shape, 1.0, tl.float32)


@triton.jit
def _forward(
    gate_up_ptr, weights_ptr, out_ptr, width, gate_up_stride, up_offset, step, alpha, limit,
    ACTIVATION: tl.constexpr, CLAMP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = column < width
    at = gate_up_ptr + row * gate_up_stride + column * step
    gate = tl.load(at, mask=known, other=0.0).to(tl.float32)
    up = tl.load(at + up_offset, mask=known, other=0.0).to(tl.float32)
    value, _, linear, _ = _parts(gate, up, alpha, limit, ACTIVATION, CLAMP)
    act = value * linear * tl.load(weights_ptr + row)
    tl.store(out_ptr + row * width + column, act.to(out_ptr.dtype.element_ty), mask=known)


@triton.jit
def _backward(
    dact_ptr, gate_up_ptr, weights_ptr, dweights_ptr, width, dact_stride, gate_up_stride, up_offset, step, alpha, limit,
    ACTIVATION: tl.constexpr, CLAMP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights_ptr + row)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        known = column < width
        at = gate_up_ptr + row * gate_up_stride + column * step
        from_dact = dact_ptr + row * dact_stride + column
        gate = tl.load(at, mask=known, other=0.0).to(tl.float32)
        up = tl.load(at + up_offset, mask=known, other=0.0).to(tl.float32)
        grad = tl.load(from_dact, mask=known, other=0.0).to(tl.float32)
        value, slope, linear, inside = _parts(gate, up, alpha, limit, ACTIVATION, CLAMP)
        act = value * linear
        total += grad * act
        grad = grad * weight
        kind = gate_up_ptr.dtype.element_ty
        tl.store(at, (grad * linear * slope).to(kind), mask=known)
        tl.store(at + up_offset, (grad * value * inside).to(kind), mask=known)
        tl.store(from_dact, (act * weight).to(kind), mask=known)
    tl.store(dweights_ptr + row, tl.sum(total, 0))


def _layout(gate_up: Tensor, gating: Gating) -> tuple[int, int, int, int]:
    """Width, row stride, distance from a gate to its up, distance between gates."""
    width = gate_up.shape[1] // 2
    return width, gate_up.stride(0), 1 if gating.interleaved else width, 2 if gating.interleaved else 1


def _options(width: int, gating: Gating) -> dict[str, object]:
    clamped = gating.activation == CLAMPED
    return {
        "ACTIVATION": "silu" if clamped else gating.activation,
        "CLAMP": clamped,
        "BLOCK": min(1024, triton.next_power_of_2(width)),
        "num_warps": 4,
    }


def forward(gate_up: Tensor, weights: Tensor, gating: Gating) -> Tensor:
    width, stride, up_offset, step = _layout(gate_up, gating)
    out = gate_up.new_empty(gate_up.shape[0], width)
    options = _options(width, gating)
    if out.numel():
        _forward[(gate_up.shape[0], triton.cdiv(width, options["BLOCK"]))](  # type: ignore[arg-type]
            gate_up, weights.contiguous(), out, width, stride, up_offset, step,
            gating.alpha, min(gating.limit, 3e38), **options,
        )  # fmt: skip
    return out


def backward_(
    dact: Tensor, gate_up: Tensor, weights: Tensor, gating: Gating
) -> tuple[Tensor, Tensor, Tensor]:
    width, stride, up_offset, step = _layout(gate_up, gating)
    dweights = torch.empty(gate_up.shape[0], dtype=torch.float32, device=gate_up.device)
    if dact.numel():
        _backward[(gate_up.shape[0],)](
            dact, gate_up, weights.contiguous(), dweights, width, dact.stride(0), stride, up_offset, step,
            gating.alpha, min(gating.limit, 3e38), **_options(width, gating),
        )  # fmt: skip
    return dact, gate_up, dweights
