"""Gated linear units in Triton, one pass each way: elementwise over a row and a block of columns; over tiles of tokens
and columns where adapters' shares are added on the way in."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.lora import LowRank
from pronghorn.kernels.triton.launch import unit_rows
from pronghorn.kernels.triton.lora import is_wide, rank_block, share

BLOCK = 1024


@triton.jit
def value_and_slope(x, ACTIVATION: tl.constexpr):
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
    value, _ = value_and_slope(gate, ACTIVATION)
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
    value, slope = value_and_slope(gate, ACTIVATION)
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    tl.store(act_ptr + row * act_stride + columns, (value * up).to(dtype), mask=inside)
    tl.store(dgate_ptr + row * dgate_stride + columns, (dact * up * slope).to(dtype), mask=inside)
    tl.store(dup_ptr + row * dup_stride + columns, (dact * value).to(dtype), mask=inside)


@triton.jit
def _forward_adapted(
    gate_ptr, up_ptr, act_ptr, xa_gate_ptr, b_gate_ptr, xa_up_ptr, b_up_ptr, s_gate, s_up, rank_gate, rank_up,
    gate_stride, up_stride, xa_gate_stride, xa_up_stride, tokens, width,
    ACTIVATION: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(1).to(tl.int64) * BT
    row, column = tl.arange(0, BT), tl.program_id(0) * BO + tl.arange(0, BO)
    known_row, known_column = row < tokens - start, column < width
    inside = known_row[:, None] & known_column[None, :]
    at = start * gate_stride + row[:, None] * gate_stride + column[None, :]
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    at = start * up_stride + row[:, None] * up_stride + column[None, :]
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate += share(
        xa_gate_ptr, b_gate_ptr, s_gate, rank_gate, xa_gate_stride, rank_gate, 1, start, row, column,
        known_row, known_column, R, WIDE,
    )  # fmt: skip
    up += share(
        xa_up_ptr, b_up_ptr, s_up, rank_up, xa_up_stride, rank_up, 1, start, row, column,
        known_row, known_column, R, WIDE,
    )  # fmt: skip
    value, _ = value_and_slope(gate, ACTIVATION)
    to = act_ptr + start * width + row[:, None] * width + column[None, :]
    tl.store(to, (value * up).to(act_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_adapted(
    dact_ptr, gate_ptr, up_ptr, act_ptr, dgate_ptr, dup_ptr,
    xa_gate_ptr, b_gate_ptr, xa_up_ptr, b_up_ptr, s_gate, s_up, rank_gate, rank_up,
    dact_stride, gate_stride, up_stride, act_stride, dgate_stride, dup_stride, xa_gate_stride, xa_up_stride,
    tokens, width,
    ACTIVATION: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(1).to(tl.int64) * BT
    row, column = tl.arange(0, BT), tl.program_id(0) * BO + tl.arange(0, BO)
    known_row, known_column = row < tokens - start, column < width
    inside = known_row[:, None] & known_column[None, :]
    # All loads come before the stores, which may go to the same addresses.
    at = start * gate_stride + row[:, None] * gate_stride + column[None, :]
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    at = start * up_stride + row[:, None] * up_stride + column[None, :]
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    at = start * dact_stride + row[:, None] * dact_stride + column[None, :]
    dact = tl.load(dact_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate += share(
        xa_gate_ptr, b_gate_ptr, s_gate, rank_gate, xa_gate_stride, rank_gate, 1, start, row, column,
        known_row, known_column, R, WIDE,
    )  # fmt: skip
    up += share(
        xa_up_ptr, b_up_ptr, s_up, rank_up, xa_up_stride, rank_up, 1, start, row, column,
        known_row, known_column, R, WIDE,
    )  # fmt: skip
    value, slope = value_and_slope(gate, ACTIVATION)
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    to = act_ptr + start * act_stride + row[:, None] * act_stride + column[None, :]
    tl.store(to, (value * up).to(dtype), mask=inside)
    to = dgate_ptr + start * dgate_stride + row[:, None] * dgate_stride + column[None, :]
    tl.store(to, (dact * up * slope).to(dtype), mask=inside)
    to = dup_ptr + start * dup_stride + row[:, None] * dup_stride + column[None, :]
    tl.store(to, (dact * value).to(dtype), mask=inside)


def forward(
    gate: Tensor, up: Tensor, activation: str, gate_adapter: LowRank | None, up_adapter: LowRank | None
) -> Tensor:
    gate, up = unit_rows(gate), unit_rows(up)
    rows, width = gate.shape
    act = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    if not act.numel():
        return act
    adapters = adapter_arguments(gate_adapter, up_adapter)
    if adapters is not None:
        config = tile_config()
        _forward_adapted[(triton.cdiv(width, config["BO"]), triton.cdiv(rows, config["BT"]))](
            gate, up, act, *adapters.tensors, *adapters.scalings, *adapters.ranks,
            gate.stride(0), up.stride(0), *adapters.strides, rows, width,
            ACTIVATION=activation, R=rank_block(adapters.ranks), WIDE=is_wide(gate), **config,
        )  # fmt: skip
    else:
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
    dact: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    gate_adapter: LowRank | None,
    up_adapter: LowRank | None,
    inplace: bool,
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
    if not gate.numel():
        return act, dgate, dup
    row_strides = [x.stride(0) for x in (dact, gate, up, act, dgate, dup)]
    adapters = adapter_arguments(gate_adapter, up_adapter)
    if adapters is not None:
        config = tile_config()
        _backward_adapted[(triton.cdiv(width, config["BO"]), triton.cdiv(rows, config["BT"]))](
            dact, gate, up, act, dgate, dup, *adapters.tensors, *adapters.scalings, *adapters.ranks,
            *row_strides, *adapters.strides, rows, width,
            ACTIVATION=activation, R=rank_block(adapters.ranks), WIDE=is_wide(gate), **config,
        )  # fmt: skip
    else:
        _backward[(rows, triton.cdiv(width, BLOCK))](
            dact,
            gate,
            up,
            act,
            dgate,
            dup,
            *row_strides,
            width,
            ACTIVATION=activation,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return act, dgate, dup


class Adapters(NamedTuple):
    """Kernel arguments of the adapters of gate and up; one that is missing has rank 0."""

    tensors: list[Tensor]
    scalings: list[float]
    ranks: list[int]
    strides: list[int]


def adapter_arguments(gate: LowRank | None, up: LowRank | None) -> Adapters | None:
    """xa and b of both, their scalings, ranks and strides of xa; None without adapters."""
    given = [adapter for adapter in (gate, up) if adapter is not None]
    if not given:
        return None
    found = Adapters([], [], [], [])
    for adapter in (gate, up):
        xa, b, scaling = given[0] if adapter is None else adapter
        xa = unit_rows(xa)
        found.tensors.extend((xa, b.contiguous()))
        found.scalings.append(float(scaling))
        found.ranks.append(0 if adapter is None else b.shape[1])
        found.strides.append(xa.stride(0))
    return found


def tile_config() -> dict[str, int]:
    """64 × 64: 32 fp32 numbers a thread and operand, of which backward holds five."""
    return {"BT": 64, "BO": 64, "num_warps": 4}
