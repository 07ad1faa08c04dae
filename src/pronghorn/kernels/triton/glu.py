"""Gated linear units in Triton, one pass each way: elementwise over a row and a block of columns; over tiles of tokens
and columns where adapters' shares are added on the way in."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.lora import LowRank
from pronghorn.kernels.triton.launch import FEW_ROWS, dependent_launch, launch_next, unit_rows, wait_for_last
from pronghorn.kernels.triton.lora import is_wide, rank_block, share

BLOCK = 1024


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """σ(x) in fp32. FAST: by the two approximate instructions alone, 2 ulp each, without care for what underflows."""
    if FAST:
        e = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;",
            "=f,f",
            [x * -1.4426950408889634],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.sigmoid(x)


@triton.jit
def value_and_slope(x, ACTIVATION: tl.constexpr, FAST: tl.constexpr = False):
    """f(x) and f'(x) in fp32; see `kernels.glu` for the formulas."""
    if ACTIVATION == "silu":
        s = sigmoid(x, FAST)
        value = x * s
        slope = s + value * (1.0 - s)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # tanh z = 2 σ(2z) - 1
        t = 2.0 * sigmoid(2.0 * inner, FAST) - 1.0
        half = 0.5 * (1.0 + t)
        value = x * half
        slope = half + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return value, slope


@triton.jit
def powers(ptr, column, known_column, EXPONENTS: tl.constexpr):
    """2^exponent of columns in fp32; 1 where there are no exponents."""
    exponent = tl.zeros_like(column).to(tl.int32)
    if EXPONENTS:
        exponent = tl.load(ptr + column, mask=known_column, other=0).to(tl.int32)
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def largest(x, power, EXPONENTS: tl.constexpr, kind: tl.constexpr):
    """|x · power| in fp32, of what row maxima are taken; bf16 rounds them afterwards, which comes to the same."""
    if kind != tl.bfloat16:
        x = x.to(kind).to(tl.float32)
    if EXPONENTS:
        x = x * (power[None, :] if len(x.shape) == 2 else power)
    return tl.abs(x)


@triton.jit
def keep_max(row_max_ptr, row, size, known_row, kind: tl.constexpr):
    """row_max [row] = max(row_max, size), as integers: numbers that are not negative order as their bits do."""
    if kind == tl.bfloat16:
        size = size.to(tl.bfloat16).to(tl.float32)
    tl.atomic_max(row_max_ptr + row, size.to(tl.int32, bitcast=True), mask=known_row, sem="relaxed")


@triton.jit
def _forward(
    gate_ptr, up_ptr, act_ptr, row_max_ptr, gate_stride, up_stride, width,
    ROW_MAX: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    if PDL:
        launch_next()
        wait_for_last()
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = value_and_slope(gate, ACTIVATION)
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    act = (value * up).to(dtype)
    tl.store(act_ptr + row * width + columns, act, mask=inside)
    if ROW_MAX:
        keep_max(row_max_ptr, row, tl.max(largest(value * up, 1.0, False, dtype), 0), row >= 0, dtype)


@triton.jit
def _backward(
    dact_ptr, gate_ptr, up_ptr, act_ptr, dgate_ptr, dup_ptr, row_max_ptr, gate_exponents_ptr, up_exponents_ptr,
    dact_stride, gate_stride, up_stride, act_stride, dgate_stride, dup_stride, width,
    ROW_MAX: tl.constexpr, EXPONENTS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
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
    dgate, dup = (dact * up * slope).to(dtype), (dact * value).to(dtype)
    tl.store(dgate_ptr + row * dgate_stride + columns, dgate, mask=inside)
    tl.store(dup_ptr + row * dup_stride + columns, dup, mask=inside)
    if ROW_MAX:
        size = largest(
            dact * up * slope, powers(gate_exponents_ptr, columns, inside, EXPONENTS), EXPONENTS, dtype
        )
        size = tl.maximum(
            size,
            largest(dact * value, powers(up_exponents_ptr, columns, inside, EXPONENTS), EXPONENTS, dtype),
        )
        keep_max(row_max_ptr, row, tl.max(size, 0), row >= 0, dtype)


@triton.jit
def _forward_adapted(
    gate_ptr, up_ptr, act_ptr, row_max_ptr,
    xa_gate_ptr, b_gate_ptr, xa_up_ptr, b_up_ptr, s_gate, s_up, rank_gate, rank_up,
    gate_stride, up_stride, xa_gate_stride, xa_up_stride, tokens, width,
    ROW_MAX: tl.constexpr, ACTIVATION: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr,
    WIDE: tl.constexpr,
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
    value, _ = value_and_slope(gate, ACTIVATION, not WIDE)
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    act = (value * up).to(dtype)
    tl.store(act_ptr + start * width + row[:, None] * width + column[None, :], act, mask=inside)
    if ROW_MAX:
        size = tl.max(largest(value * up, 1.0, False, dtype), 1)
        keep_max(row_max_ptr, start + row, size, known_row, dtype)


@triton.jit
def _backward_adapted(
    dact_ptr, gate_ptr, up_ptr, act_ptr, dgate_ptr, dup_ptr, row_max_ptr, gate_exponents_ptr, up_exponents_ptr,
    xa_gate_ptr, b_gate_ptr, xa_up_ptr, b_up_ptr, s_gate, s_up, rank_gate, rank_up,
    dact_stride, gate_stride, up_stride, act_stride, dgate_stride, dup_stride, xa_gate_stride, xa_up_stride,
    tokens, width, ROW_MAX: tl.constexpr, EXPONENTS: tl.constexpr,
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
    value, slope = value_and_slope(gate, ACTIVATION, not WIDE)
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    to = act_ptr + start * act_stride + row[:, None] * act_stride + column[None, :]
    tl.store(to, (value * up).to(dtype), mask=inside)
    dgate, dup = (dact * up * slope).to(dtype), (dact * value).to(dtype)
    tl.store(
        dgate_ptr + start * dgate_stride + row[:, None] * dgate_stride + column[None, :], dgate, mask=inside
    )
    tl.store(dup_ptr + start * dup_stride + row[:, None] * dup_stride + column[None, :], dup, mask=inside)
    if ROW_MAX:
        gate_power = powers(gate_exponents_ptr, column, known_column, EXPONENTS)
        up_power = powers(up_exponents_ptr, column, known_column, EXPONENTS)
        size = tl.maximum(
            largest(dact * up * slope, gate_power, EXPONENTS, dtype),
            largest(dact * value, up_power, EXPONENTS, dtype),
        )
        keep_max(row_max_ptr, start + row, tl.max(size, 1), known_row, dtype)


def forward(
    gate: Tensor,
    up: Tensor,
    activation: str,
    gate_adapter: LowRank | None,
    up_adapter: LowRank | None,
    row_max: Tensor | None,
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
            gate, up, act, bits(row_max, gate), *adapters.tensors, *adapters.scalings, *adapters.ranks,
            gate.stride(0), up.stride(0), *adapters.strides, rows, width, ROW_MAX=row_max is not None,
            ACTIVATION=activation, R=rank_block(adapters.ranks), WIDE=is_wide(gate), **config,
        )  # fmt: skip
    else:
        pdl = dependent_launch(gate.device) if rows <= FEW_ROWS else {}
        _forward[(rows, triton.cdiv(width, BLOCK))](
            gate, up, act, bits(row_max, gate), gate.stride(0), up.stride(0), width,
            ROW_MAX=row_max is not None, ACTIVATION=activation, BLOCK=BLOCK, PDL=bool(pdl), num_warps=4, **pdl,
        )  # fmt: skip
    return act


def backward(
    dact: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    gate_adapter: LowRank | None,
    up_adapter: LowRank | None,
    inplace: bool,
    row_max: Tensor | None,
    exponents: tuple[Tensor, Tensor] | None,
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
    maxima, wanted = maxima_arguments(row_max, exponents, gate)
    row_strides = [x.stride(0) for x in (dact, gate, up, act, dgate, dup)]
    adapters = adapter_arguments(gate_adapter, up_adapter)
    if adapters is not None:
        config = tile_config()
        _backward_adapted[(triton.cdiv(width, config["BO"]), triton.cdiv(rows, config["BT"]))](
            dact, gate, up, act, dgate, dup, *maxima, *adapters.tensors, *adapters.scalings, *adapters.ranks,
            *row_strides, *adapters.strides, rows, width, **wanted,
            ACTIVATION=activation, R=rank_block(adapters.ranks), WIDE=is_wide(gate), **config,
        )  # fmt: skip
    else:
        _backward[(rows, triton.cdiv(width, BLOCK))](
            dact, gate, up, act, dgate, dup, *maxima, *row_strides, width,
            **wanted, ACTIVATION=activation, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return act, dgate, dup


def bits(row_max: Tensor | None, like: Tensor) -> Tensor:
    """The integers that row maxima are compared as; anything where none are wanted."""
    return like if row_max is None else row_max.view(torch.int32)


def maxima_arguments(
    row_max: Tensor | None, exponents: tuple[Tensor, Tensor] | None, like: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, bool]]:
    """Backward's kernel arguments for row maxima: row_max and the exponents of gate and up; which of them are there."""
    gate, up = exponents or (like, like)
    return (bits(row_max, like), gate, up), {
        "ROW_MAX": row_max is not None,
        "EXPONENTS": exponents is not None,
    }


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
