"""The rotation's backward into columns of one matrix, v's gradient copied beside: a token and some heads a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.triton.fp8 import column_factors, inverse, scale_for
from pronghorn.kernels.triton.rope import places

#: Heads a program holds at once.
HEADS = 8


@triton.jit
def _unrotate_joined(
    dq_ptr, dk_ptr, dv_ptr, out_ptr, cos_ptr, sin_ptr, q_heads, k_heads, dq_stride, dk_stride, dv_stride, out_stride,
    q_groups, k_groups,
    D: tl.constexpr, ROTATED: tl.constexpr, STEP: tl.constexpr, APART: tl.constexpr, HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    zero = group * 0  # makes tensors of numbers that may be constants, so that the branches agree
    half: tl.constexpr = ROTATED // 2
    # Columns of each half that turn: none of v's.
    from_ptr, heads, stride, begin, turned = dq_ptr, zero + q_heads, zero + dq_stride, zero, zero + half
    if group >= q_groups + k_groups:
        from_ptr, heads, stride, turned = dv_ptr, zero + k_heads, zero + dv_stride, zero
        group, begin = group - (q_groups + k_groups), (zero + q_heads + k_heads) * D
    elif group >= q_groups:
        from_ptr, heads, stride = dk_ptr, zero + k_heads, zero + dk_stride
        group, begin = group - q_groups, (zero + q_heads) * D
    head, column = group * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF_BLOCK)
    place = column * STEP
    offset = head[:, None] * D + place[None, :]
    inside = (head < heads)[:, None] & (column < half)[None, :]
    from_row, to_row = from_ptr + token * stride, out_ptr + token * out_stride + begin
    first = tl.load(from_row + offset, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(from_row + offset + APART, mask=inside, other=0.0).to(tl.float32)
    turns = column < turned
    angle = token * ROTATED + place
    cos_first = tl.load(cos_ptr + angle, mask=turns, other=1.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos_ptr + angle + APART, mask=turns, other=1.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin_ptr + angle, mask=turns, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin_ptr + angle + APART, mask=turns, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(to_row + offset, (first * cos_first + second * sin_second).to(dtype), mask=inside)
    tl.store(to_row + offset + APART, (second * cos_second - first * sin_first).to(dtype), mask=inside)
    if REST_BLOCK > 0:
        column = ROTATED + tl.arange(0, REST_BLOCK)
        offset = head[:, None] * D + column[None, :]
        inside = (head < heads)[:, None] & (column < D)[None, :]
        tl.store(to_row + offset, tl.load(from_row + offset, mask=inside, other=0.0), mask=inside)


def unrotate_joined(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    dq, dk, dv = (_heads_packed(x) for x in (dq, dk, dv))
    cos, sin = cos.contiguous(), sin.contiguous()
    tokens, q_heads, size = dq.shape
    k_heads, rotated = dk.shape[1], cos.shape[-1]
    out = torch.empty(tokens, (q_heads + 2 * k_heads) * size, dtype=dq.dtype, device=dq.device)
    q_groups, k_groups, rest = triton.cdiv(q_heads, HEADS), triton.cdiv(k_heads, HEADS), size - rotated
    if tokens:
        _unrotate_joined[(tokens, q_groups + 2 * k_groups)](
            dq, dk, dv, out, cos, sin, q_heads, k_heads, dq.stride(0), dk.stride(0), dv.stride(0), out.stride(0),
            q_groups, k_groups, **places(rotated, pairs), D=size, ROTATED=rotated, HEADS=HEADS,
            HALF_BLOCK=triton.next_power_of_2(rotated // 2),
            REST_BLOCK=triton.next_power_of_2(rest) if rest else 0, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _part(
    from_ptr, out_row, columns_ptr, cos_ptr, sin_ptr, token, stride, heads, begin,
    TURNS: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's heads of one tensor turned back and stored; the stored halves times their columns' factors."""
    half: tl.constexpr = D // 2
    head, column = tl.arange(0, HEADS), tl.arange(0, HALF_BLOCK)
    offset = head[:, None] * D + column[None, :]
    inside = (head < heads)[:, None] & (column < half)[None, :]
    from_row, to_row = from_ptr + token * stride, out_row + begin
    first = tl.load(from_row + offset, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(from_row + offset + half, mask=inside, other=0.0).to(tl.float32)
    if TURNS:
        angle, known = token * D + column, column < half
        cos_first = tl.load(cos_ptr + angle, mask=known, other=1.0).to(tl.float32)[None, :]
        cos_second = tl.load(cos_ptr + angle + half, mask=known, other=1.0).to(tl.float32)[None, :]
        sin_first = tl.load(sin_ptr + angle, mask=known, other=0.0).to(tl.float32)[None, :]
        sin_second = tl.load(sin_ptr + angle + half, mask=known, other=0.0).to(tl.float32)[None, :]
        turned = first * cos_first + second * sin_second
        second = second * cos_second - first * sin_first
        first = turned
    dtype: tl.constexpr = out_row.dtype.element_ty
    rounded_first, rounded_second = first.to(dtype), second.to(dtype)
    tl.store(to_row + offset, rounded_first, mask=inside)
    tl.store(to_row + offset + half, rounded_second, mask=inside)
    factors = columns_ptr + begin
    scaled_first = rounded_first.to(tl.float32) * column_factors(factors, offset, inside)
    return scaled_first, rounded_second.to(tl.float32) * column_factors(factors, offset + half, inside)


@triton.jit
def _largest(first, second):
    return tl.max(tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 1), 0)


@triton.jit
def _store_codes(
    codes_row, first, second, scale, heads, D: tl.constexpr, HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr
):
    head, column = tl.arange(0, HEADS), tl.arange(0, HALF_BLOCK)
    offset = head[:, None] * D + column[None, :]
    inside = (head < heads)[:, None] & (column < D // 2)[None, :]
    tl.store(codes_row + offset, (first * inverse(scale)).to(tl.float8e4nv), mask=inside)
    tl.store(codes_row + offset + D // 2, (second * inverse(scale)).to(tl.float8e4nv), mask=inside)


@triton.jit
def _unrotate_quantise(
    dq_ptr, dk_ptr, dv_ptr, out_ptr, codes_ptr, scales_ptr, columns_ptr, cos_ptr, sin_ptr, q_heads, k_heads,
    dq_stride, dk_stride, dv_stride, width,
    D: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    """One token a program: it holds the whole row, whose largest number it needs."""
    token = tl.program_id(0).to(tl.int64)
    out_row, codes_row = out_ptr + token * width, codes_ptr + token * width
    k_begin, v_begin = q_heads * D, (q_heads + k_heads) * D
    q_first, q_second = _part(
        dq_ptr, out_row, columns_ptr, cos_ptr, sin_ptr, token, dq_stride, q_heads, 0, True, D, Q_HEADS, HALF_BLOCK
    )  # fmt: skip
    k_first, k_second = _part(
        dk_ptr, out_row, columns_ptr, cos_ptr, sin_ptr, token, dk_stride, k_heads, k_begin, True, D, K_HEADS, HALF_BLOCK
    )  # fmt: skip
    v_first, v_second = _part(
        dv_ptr, out_row, columns_ptr, cos_ptr, sin_ptr, token, dv_stride, k_heads, v_begin, False, D, K_HEADS,
        HALF_BLOCK,
    )  # fmt: skip
    largest = tl.maximum(_largest(k_first, k_second), _largest(v_first, v_second))
    scale = scale_for(tl.maximum(largest, _largest(q_first, q_second)))
    tl.store(scales_ptr + token, scale)
    _store_codes(codes_row, q_first, q_second, scale, q_heads, D, Q_HEADS, HALF_BLOCK)
    _store_codes(codes_row + k_begin, k_first, k_second, scale, k_heads, D, K_HEADS, HALF_BLOCK)
    _store_codes(codes_row + v_begin, v_first, v_second, scale, k_heads, D, K_HEADS, HALF_BLOCK)


def unrotate_joined_fp8(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, columns: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    dq, dk, dv = (_heads_packed(x) for x in (dq, dk, dv))
    cos, sin = cos.contiguous(), sin.contiguous()
    tokens, q_heads, size = dq.shape
    k_heads = dk.shape[1]
    width = (q_heads + 2 * k_heads) * size
    out = torch.empty(tokens, width, dtype=dq.dtype, device=dq.device)
    codes = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=dq.device)
    scales = torch.empty(tokens, 1, dtype=torch.float32, device=dq.device)
    if tokens:
        _unrotate_quantise[(tokens,)](
            dq, dk, dv, out, codes, scales, columns.contiguous().view(-1), cos, sin, q_heads, k_heads,
            dq.stride(0), dk.stride(0), dv.stride(0), width, D=size, Q_HEADS=triton.next_power_of_2(q_heads),
            K_HEADS=triton.next_power_of_2(k_heads), HALF_BLOCK=triton.next_power_of_2(size // 2),
            num_warps=8 if width >= 4096 else 4,
        )  # fmt: skip
    return out, (codes, scales)


def _heads_packed(x: Tensor) -> Tensor:
    """x [T, N, D] with heads and elements contiguous inside a token; tokens may be strided."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
