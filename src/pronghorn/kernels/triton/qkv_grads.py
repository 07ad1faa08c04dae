"""The rotation's backward into columns of one matrix, v's gradient copied beside: a token and some heads a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Heads a program holds at once.
HEADS = 8


@triton.jit
def _unrotate_joined(
    dq_ptr, dk_ptr, dv_ptr, out_ptr, cos_ptr, sin_ptr, q_heads, k_heads, dq_stride, dk_stride, dv_stride, out_stride,
    q_groups, k_groups,
    D: tl.constexpr, ROTATED: tl.constexpr, HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
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
    offset = head[:, None] * D + column[None, :]
    inside = (head < heads)[:, None] & (column < half)[None, :]
    from_row, to_row = from_ptr + token * stride, out_ptr + token * out_stride + begin
    first = tl.load(from_row + offset, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(from_row + offset + half, mask=inside, other=0.0).to(tl.float32)
    turns = column < turned
    angle = token * ROTATED + column
    cos_first = tl.load(cos_ptr + angle, mask=turns, other=1.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos_ptr + angle + half, mask=turns, other=1.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin_ptr + angle, mask=turns, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin_ptr + angle + half, mask=turns, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(to_row + offset, (first * cos_first + second * sin_second).to(dtype), mask=inside)
    tl.store(to_row + offset + half, (second * cos_second - first * sin_first).to(dtype), mask=inside)
    if REST_BLOCK > 0:
        column = ROTATED + tl.arange(0, REST_BLOCK)
        offset = head[:, None] * D + column[None, :]
        inside = (head < heads)[:, None] & (column < D)[None, :]
        tl.store(to_row + offset, tl.load(from_row + offset, mask=inside, other=0.0), mask=inside)


def unrotate_joined(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dq, dk, dv = (_heads_packed(x) for x in (dq, dk, dv))
    cos, sin = cos.contiguous(), sin.contiguous()
    tokens, q_heads, size = dq.shape
    k_heads, rotated = dk.shape[1], cos.shape[-1]
    out = torch.empty(tokens, (q_heads + 2 * k_heads) * size, dtype=dq.dtype, device=dq.device)
    q_groups, k_groups, rest = triton.cdiv(q_heads, HEADS), triton.cdiv(k_heads, HEADS), size - rotated
    if tokens:
        _unrotate_joined[(tokens, q_groups + 2 * k_groups)](
            dq, dk, dv, out, cos, sin, q_heads, k_heads, dq.stride(0), dk.stride(0), dv.stride(0), out.stride(0),
            q_groups, k_groups, D=size, ROTATED=rotated, HEADS=HEADS,
            HALF_BLOCK=triton.next_power_of_2(rotated // 2),
            REST_BLOCK=triton.next_power_of_2(rest) if rest else 0, num_warps=4,
        )  # fmt: skip
    return out


def _heads_packed(x: Tensor) -> Tensor:
    """x [T, N, D] with heads and elements contiguous inside a token; tokens may be strided."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
