"""A gated linear unit together with the down projection's adapter: the activation is multiplied where it is made.

Forward also gives XA = act · Aᵀ. Backward completes dact by dXA · A on the way in and adds dXAᵀ · act to A's gradient;
it then has no use for act itself, which is neither written nor read. Partial sums go through fp32 buffers and are added
in a fixed order.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.lora import LowRank
from pronghorn.kernels.triton.glu import (
    Adapters,
    adapter_arguments,
    bits,
    keep_max,
    largest,
    maxima_arguments,
    powers,
    value_and_slope,
)
from pronghorn.kernels.triton.launch import unit_rows
from pronghorn.kernels.triton.lora import dot, is_wide, limits, rank_block
from pronghorn.kernels.triton.lora_grads import sum_a_grads, sum_rows


@triton.jit
def _factor(ptr, row, known_row, r, rank, stride):
    """[rows, R] of a factor whose rows are `rank` long."""
    return tl.load(
        ptr + row[:, None] * stride + r[None, :], mask=known_row[:, None] & (r < rank)[None, :], other=0.0
    )


@triton.jit
def _forward(
    gate_ptr, up_ptr, act_ptr, row_max_ptr, a_ptr, partial_ptr, xa_gate_ptr, b_gate_ptr, xa_up_ptr, b_up_ptr,
    s_gate, s_up, rank_gate, rank_up, rank_down, gate_stride, up_stride, xa_gate_stride, xa_up_stride,
    tokens, width,
    ROW_MAX: tl.constexpr, ACTIVATION: tl.constexpr, R: tl.constexpr, BT: tl.constexpr,
    BO: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program keeps BT tokens and takes one of so many blocks of columns: neighbours read side by side."""
    piece, pieces, start = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64) * BT
    row, r, offset = tl.arange(0, BT), tl.arange(0, R), tl.arange(0, BO)
    known_row = row < tokens - start
    known_rank = (r < rank_down)[:, None]
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    xa = tl.zeros([BT, R], dtype=tl.float32)
    xa_gate = _factor(xa_gate_ptr + start * xa_gate_stride, row, known_row, r, rank_gate, xa_gate_stride)
    xa_up = _factor(xa_up_ptr + start * xa_up_stride, row, known_row, r, rank_up, xa_up_stride)
    if ROW_MAX:
        size = tl.zeros([BT], dtype=tl.float32)
    gate_at = gate_ptr + start * gate_stride + row[:, None] * gate_stride
    up_at = up_ptr + start * up_stride + row[:, None] * up_stride
    act_at = act_ptr + start * width + row[:, None] * width
    for first in tl.range(piece * BO, width, pieces * BO, num_stages=STAGES):
        column = first + offset
        known_column = column < width
        inside = known_row[:, None] & known_column[None, :]
        gate = tl.load(gate_at + column[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_at + column[None, :], mask=inside, other=0.0).to(tl.float32)
        b_gate = _factor(b_gate_ptr, column, known_column, r, rank_gate, rank_gate)
        b_up = _factor(b_up_ptr, column, known_column, r, rank_up, rank_up)
        gate += dot(xa_gate, tl.trans(b_gate), WIDE) * s_gate
        up += dot(xa_up, tl.trans(b_up), WIDE) * s_up
        value, _ = value_and_slope(gate, ACTIVATION, not WIDE)
        act = (value * up).to(dtype)
        tl.store(act_at + column[None, :], act, mask=inside)
        a = tl.load(
            a_ptr + r[:, None] * width + column[None, :], mask=known_rank & known_column[None, :], other=0.0
        )
        xa += dot(act, tl.trans(a), WIDE)
        if ROW_MAX:
            size = tl.maximum(size, tl.max(largest(value * up, 1.0, False, dtype), 1))
    to = partial_ptr + (piece.to(tl.int64) * tokens + start) * R + row[:, None] * R + r[None, :]
    tl.store(to, xa, mask=known_row[:, None])
    if ROW_MAX:
        keep_max(row_max_ptr, start + row, size, known_row, dtype)


@triton.jit
def _backward(
    dact_ptr, gate_ptr, up_ptr, row_max_ptr, gate_exponents_ptr, up_exponents_ptr, dxa_ptr,
    a_ptr, partial_ptr, xa_gate_ptr, b_gate_ptr, xa_up_ptr, b_up_ptr,
    s_gate, s_up, rank_gate, rank_up, rank_down, dact_stride, gate_stride, up_stride, dxa_stride,
    xa_gate_stride, xa_up_stride, tokens, width, tokens_each,
    ROW_MAX: tl.constexpr, EXPONENTS: tl.constexpr, ACTIVATION: tl.constexpr, R: tl.constexpr,
    BT: tl.constexpr, BO: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """gate and up become their gradients for dact + dXA · A. A program keeps BO columns for a share of the tokens."""
    piece = tl.program_id(1)
    row, column, r = tl.arange(0, BT), tl.program_id(0) * BO + tl.arange(0, BO), tl.arange(0, R)
    known_column = column < width
    a = tl.load(
        a_ptr + r[:, None] * width + column[None, :],
        mask=(r < rank_down)[:, None] & known_column[None, :],
        other=0.0,
    )
    b_gate = tl.load(
        b_gate_ptr + column[:, None] * rank_gate + r[None, :],
        mask=known_column[:, None] & (r < rank_gate)[None, :], other=0.0,
    )  # fmt: skip
    b_up = tl.load(
        b_up_ptr + column[:, None] * rank_up + r[None, :],
        mask=known_column[:, None] & (r < rank_up)[None, :], other=0.0,
    )  # fmt: skip
    if ROW_MAX:
        gate_power = powers(gate_exponents_ptr, column, known_column, EXPONENTS)
        up_power = powers(up_exponents_ptr, column, known_column, EXPONENTS)
    da = tl.zeros([BO, R], dtype=tl.float32)
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    begin = piece * tokens_each
    at = begin.to(tl.int64)
    # The loop's own number of stages brings dact in ahead too, which no product takes.
    for start in tl.range(begin, tl.minimum(begin + tokens_each, tokens), BT, num_stages=STAGES):
        known_row = row < tokens - start
        inside = known_row[:, None] & known_column[None, :]
        gate_at = gate_ptr + at * gate_stride + row[:, None] * gate_stride + column[None, :]
        gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
        up_at = up_ptr + at * up_stride + row[:, None] * up_stride + column[None, :]
        up = tl.load(up_at, mask=inside, other=0.0).to(tl.float32)
        dact_at = dact_ptr + at * dact_stride + row[:, None] * dact_stride + column[None, :]
        dact = tl.load(dact_at, mask=inside, other=0.0).to(tl.float32)
        dxa = tl.load(
            dxa_ptr + at * dxa_stride + row[:, None] * dxa_stride + r[None, :],
            mask=known_row[:, None] & (r < rank_down)[None, :], other=0.0,
        )  # fmt: skip
        xa_gate = tl.load(
            xa_gate_ptr + at * xa_gate_stride + row[:, None] * xa_gate_stride + r[None, :],
            mask=known_row[:, None] & (r < rank_gate)[None, :], other=0.0,
        )  # fmt: skip
        xa_up = tl.load(
            xa_up_ptr + at * xa_up_stride + row[:, None] * xa_up_stride + r[None, :],
            mask=known_row[:, None] & (r < rank_up)[None, :], other=0.0,
        )  # fmt: skip
        gate += dot(xa_gate, tl.trans(b_gate), WIDE) * s_gate
        up += dot(xa_up, tl.trans(b_up), WIDE) * s_up
        dact += dot(dxa, a, WIDE)
        value, slope = value_and_slope(gate, ACTIVATION, not WIDE)
        dgate, dup = (dact * up * slope).to(dtype), (dact * value).to(dtype)
        tl.store(gate_at, dgate, mask=inside)
        tl.store(up_at, dup, mask=inside)
        if ROW_MAX:
            size = tl.maximum(
                largest(dact * up * slope, gate_power, EXPONENTS, dtype),
                largest(dact * value, up_power, EXPONENTS, dtype),
            )
            keep_max(row_max_ptr, at + row, tl.max(size, 1), known_row, dtype)
        da += dot(tl.trans((value * up).to(dtype)), dxa, WIDE)
        at += BT
    slab = partial_ptr + piece.to(tl.int64) * rank_down * width
    tl.store(
        slab + r[:, None] * width + column[None, :],
        tl.trans(da),
        mask=(r < rank_down)[:, None] & known_column[None, :],
    )


@cache
def forward_config(tokens: int, width: int, rank: int, sms: int) -> dict[str, int]:
    """One wave of two programs a processor: columns are dealt to "PIECES" programs where tokens alone give fewer."""
    block, columns, stages = (64, 64, 3) if rank <= 32 else (64, 32, 2)
    pieces = max(1, min(2 * sms // triton.cdiv(tokens, block), triton.cdiv(width, 4 * columns)))
    return {"PIECES": pieces, "BT": block, "BO": columns, "num_warps": 4, "STAGES": stages}


@cache
def backward_config(tokens: int, width: int, rank: int, sms: int) -> dict[str, int]:
    """Whole waves of three programs a processor; a share of tokens ("TOKENS_EACH") costs a partial dA."""
    block, columns = 32, 64
    blocks, resident = triton.cdiv(width, columns), 3 * sms
    best, best_cost = tokens, float("inf")
    for pieces in range(1, min(triton.cdiv(tokens, block), 64) + 1):
        each = triton.cdiv(triton.cdiv(tokens, pieces), block) * block
        count = triton.cdiv(tokens, each)
        waves = triton.cdiv(blocks * count, resident)
        cost = waves * resident * each * columns * 10 + count * width * rank * 8
        if cost < best_cost:
            best, best_cost = each, cost
    config = {"TOKENS_EACH": best, "BT": block, "BO": columns, "num_warps": 4, "STAGES": 3}
    # Row maxima take the registers of a third program unless kept from it.
    return {**config, "maxnreg": 168} if rank <= 16 else config


def forward(
    gate: Tensor,
    up: Tensor,
    activation: str,
    a: Tensor,
    gate_adapter: LowRank | None,
    up_adapter: LowRank | None,
    row_max: Tensor | None,
) -> tuple[Tensor, Tensor]:
    gate, up, a = unit_rows(gate), unit_rows(up), a.contiguous()
    (tokens, width), rank = gate.shape, a.shape[0]
    act = torch.empty(tokens, width, dtype=gate.dtype, device=gate.device)
    xa = torch.empty(tokens, rank, dtype=gate.dtype, device=gate.device)
    if not act.numel():
        return act, xa.zero_()
    adapters = _adapters(gate_adapter, up_adapter, gate)
    padded = rank_block([rank, *adapters.ranks])
    config = dict(forward_config(tokens, width, padded, limits(gate.device)[0]))
    pieces = config.pop("PIECES")
    partial = torch.empty(pieces, tokens, padded, dtype=torch.float32, device=gate.device)
    _forward[(pieces, triton.cdiv(tokens, config["BT"]))](
        gate, up, act, bits(row_max, gate), a, partial, *adapters.tensors, *adapters.scalings, *adapters.ranks, rank,
        gate.stride(0), up.stride(0), *adapters.strides, tokens, width,
        ROW_MAX=row_max is not None, ACTIVATION=activation, R=padded,
        WIDE=is_wide(gate), **config,
    )  # fmt: skip
    sum_rows(partial, xa)
    return act, xa


def backward(
    dact: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    dxa: Tensor,
    a: Tensor,
    a_grad: Tensor,
    gate_adapter: LowRank | None,
    up_adapter: LowRank | None,
    row_max: Tensor | None,
    exponents: tuple[Tensor, Tensor] | None,
) -> None:
    if any(x.stride(-1) != 1 for x in (gate, up, a_grad)):
        raise ValueError("in place needs rows of unit stride")
    dact, dxa = unit_rows(dact), unit_rows(dxa)
    (tokens, width), rank = gate.shape, dxa.shape[1]
    if not gate.numel():
        return
    adapters = _adapters(gate_adapter, up_adapter, gate)
    padded = rank_block([rank, *adapters.ranks])
    config = dict(backward_config(tokens, width, padded, limits(gate.device)[0]))
    each = config.pop("TOKENS_EACH")
    pieces = triton.cdiv(tokens, each)
    maxima, wanted = maxima_arguments(row_max, exponents, gate)
    partial = torch.empty(pieces, rank, width, dtype=torch.float32, device=gate.device)
    _backward[(triton.cdiv(width, config["BO"]), pieces)](
        dact, gate, up, *maxima, dxa, a.contiguous(), partial,
        *adapters.tensors, *adapters.scalings, *adapters.ranks, rank,
        dact.stride(0), gate.stride(0), up.stride(0), dxa.stride(0), *adapters.strides, tokens, width, each,
        **wanted, ACTIVATION=activation, R=padded, WIDE=is_wide(gate), **config,
    )  # fmt: skip
    sum_a_grads(partial, a_grad)


def _adapters(gate: LowRank | None, up: LowRank | None, like: Tensor) -> Adapters:
    """Kernel arguments of both; without any, of rank 0. A kernel without their products does not bring gate and up in
    ahead: 244 and 490 µs instead of 190 and 310 at 8B."""
    return adapter_arguments(gate, up) or Adapters([like] * 4, [0.0, 0.0], [0, 0], [0, 0])
