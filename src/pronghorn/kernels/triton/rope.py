"""RoPE with optional per-head RMSNorm in Triton: a program takes one token and a group of heads of q or of k; with
adapters to add, a tile of tokens and some heads of q, k or v."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.lora import LowRank
from pronghorn.kernels.triton.launch import unit_rows
from pronghorn.kernels.triton.lora import LEAST_RANK, dot, is_wide, rank_block


@triton.jit
def group_forward(
    x_ptr, y_ptr, cos_ptr, sin_ptr, weight_ptr, group, heads, x_stride, y_stride, eps, weight_offset,
    NORM: tl.constexpr, D: tl.constexpr, ROTATED: tl.constexpr, STEP: tl.constexpr, APART: tl.constexpr,
    HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = ROTATED // 2
    head = group * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF_BLOCK)
    place = column * STEP
    offset = head[:, None] * D + place[None, :]
    inside = (head[:, None] < heads) & (column[None, :] < half)
    x_row, y_row = x_ptr + token * x_stride, y_ptr + token * y_stride
    first = tl.load(x_row + offset, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_row + offset + APART, mask=inside, other=0.0).to(tl.float32)
    if REST_BLOCK > 0:
        rest_column = tl.arange(0, REST_BLOCK)
        rest_offset = head[:, None] * D + ROTATED + rest_column[None, :]
        rest_inside = (head[:, None] < heads) & (rest_column[None, :] < D - ROTATED)
        rest = tl.load(x_row + rest_offset, mask=rest_inside, other=0.0).to(tl.float32)
    if NORM:
        square = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        if REST_BLOCK > 0:
            square += tl.sum(rest * rest, 1)
        rstd = (1.0 / tl.sqrt(square / D + eps))[:, None]
        known = column < half
        w_first = tl.load(weight_ptr + place, mask=known, other=0.0).to(tl.float32) + weight_offset
        w_second = tl.load(weight_ptr + APART + place, mask=known, other=0.0).to(tl.float32) + weight_offset
        first = first * rstd * w_first[None, :]
        second = second * rstd * w_second[None, :]
        if REST_BLOCK > 0:
            w_rest = tl.load(weight_ptr + ROTATED + rest_column, mask=rest_column < D - ROTATED, other=0.0)
            rest = rest * rstd * (w_rest.to(tl.float32) + weight_offset)[None, :]
    known = column < half
    angle = token * ROTATED + place
    cos_first = tl.load(cos_ptr + angle, mask=known, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos_ptr + angle + APART, mask=known, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin_ptr + angle, mask=known, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin_ptr + angle + APART, mask=known, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    tl.store(y_row + offset, (first * cos_first - second * sin_first).to(dtype), mask=inside)
    tl.store(y_row + offset + APART, (second * cos_second + first * sin_second).to(dtype), mask=inside)
    if REST_BLOCK > 0:
        tl.store(y_row + rest_offset, rest.to(dtype), mask=rest_inside)


@triton.jit
def _forward(
    q_ptr, k_ptr, qy_ptr, ky_ptr, cos_ptr, sin_ptr, qw_ptr, kw_ptr,
    q_heads, k_heads, q_stride, k_stride, qy_stride, ky_stride, eps, weight_offset, q_groups,
    NORM: tl.constexpr, D: tl.constexpr, ROTATED: tl.constexpr, STEP: tl.constexpr, APART: tl.constexpr,
    HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    if group < q_groups:
        group_forward(
            q_ptr, qy_ptr, cos_ptr, sin_ptr, qw_ptr, group, q_heads, q_stride, qy_stride, eps, weight_offset,
            NORM, D, ROTATED, STEP, APART, HEADS, HALF_BLOCK, REST_BLOCK,
        )  # fmt: skip
    else:
        group_forward(
            k_ptr, ky_ptr, cos_ptr, sin_ptr, kw_ptr, group - q_groups, k_heads, k_stride, ky_stride, eps,
            weight_offset, NORM, D, ROTATED, STEP, APART, HEADS, HALF_BLOCK, REST_BLOCK,
        )  # fmt: skip


@triton.jit
def _group_backward(
    dy_ptr, dx_ptr, x_ptr, cos_ptr, sin_ptr, weight_ptr, partial_row, group, heads,
    dy_stride, dx_stride, x_stride, eps, weight_offset,
    NORM: tl.constexpr, NEED_WEIGHT: tl.constexpr, D: tl.constexpr, ROTATED: tl.constexpr, STEP: tl.constexpr,
    APART: tl.constexpr, HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = ROTATED // 2
    head = group * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF_BLOCK)
    known, place = column < half, column * STEP
    offset = head[:, None] * D + place[None, :]
    inside = (head[:, None] < heads) & known[None, :]
    dy_row, dx_row = dy_ptr + token * dy_stride, dx_ptr + token * dx_stride
    dy_first = tl.load(dy_row + offset, mask=inside, other=0.0).to(tl.float32)
    dy_second = tl.load(dy_row + offset + APART, mask=inside, other=0.0).to(tl.float32)
    angle = token * ROTATED + place
    cos_first = tl.load(cos_ptr + angle, mask=known, other=0.0).to(tl.float32)[None, :]
    cos_second = tl.load(cos_ptr + angle + APART, mask=known, other=0.0).to(tl.float32)[None, :]
    sin_first = tl.load(sin_ptr + angle, mask=known, other=0.0).to(tl.float32)[None, :]
    sin_second = tl.load(sin_ptr + angle + APART, mask=known, other=0.0).to(tl.float32)[None, :]
    first = dy_first * cos_first + dy_second * sin_second
    second = dy_second * cos_second - dy_first * sin_first
    if REST_BLOCK > 0:
        rest_column = tl.arange(0, REST_BLOCK)
        rest_known = rest_column < D - ROTATED
        rest_offset = head[:, None] * D + ROTATED + rest_column[None, :]
        rest_inside = (head[:, None] < heads) & rest_known[None, :]
        rest = tl.load(dy_row + rest_offset, mask=rest_inside, other=0.0).to(tl.float32)
    if NORM:
        x_row = x_ptr + token * x_stride
        x_first = tl.load(x_row + offset, mask=inside, other=0.0).to(tl.float32)
        x_second = tl.load(x_row + offset + APART, mask=inside, other=0.0).to(tl.float32)
        square = tl.sum(x_first * x_first, 1) + tl.sum(x_second * x_second, 1)
        if REST_BLOCK > 0:
            x_rest = tl.load(x_row + rest_offset, mask=rest_inside, other=0.0).to(tl.float32)
            square += tl.sum(x_rest * x_rest, 1)
        rstd = (1.0 / tl.sqrt(square / D + eps))[:, None]
        x_first, x_second = x_first * rstd, x_second * rstd
        if NEED_WEIGHT:
            tl.store(partial_row + place, tl.sum(first * x_first, 0), mask=known)
            tl.store(partial_row + APART + place, tl.sum(second * x_second, 0), mask=known)
        w_first = tl.load(weight_ptr + place, mask=known, other=0.0).to(tl.float32) + weight_offset
        w_second = tl.load(weight_ptr + APART + place, mask=known, other=0.0).to(tl.float32) + weight_offset
        first, second = first * w_first[None, :], second * w_second[None, :]
        along = tl.sum(first * x_first, 1) + tl.sum(second * x_second, 1)
        if REST_BLOCK > 0:
            x_rest = x_rest * rstd
            if NEED_WEIGHT:
                tl.store(partial_row + ROTATED + rest_column, tl.sum(rest * x_rest, 0), mask=rest_known)
            w_rest = tl.load(weight_ptr + ROTATED + rest_column, mask=rest_known, other=0.0).to(tl.float32)
            rest = rest * (w_rest + weight_offset)[None, :]
            along += tl.sum(rest * x_rest, 1)
        along = (along / D)[:, None]
        first = (first - x_first * along) * rstd
        second = (second - x_second * along) * rstd
        if REST_BLOCK > 0:
            rest = (rest - x_rest * along) * rstd
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    tl.store(dx_row + offset, first.to(dtype), mask=inside)
    tl.store(dx_row + offset + APART, second.to(dtype), mask=inside)
    if REST_BLOCK > 0:
        tl.store(dx_row + rest_offset, rest.to(dtype), mask=rest_inside)


@triton.jit
def _backward(
    dq_ptr, dk_ptr, dqx_ptr, dkx_ptr, q_ptr, k_ptr, cos_ptr, sin_ptr, qw_ptr, kw_ptr, partial_ptr,
    q_heads, k_heads, dq_stride, dk_stride, dqx_stride, dkx_stride, q_stride, k_stride,
    eps, weight_offset, q_groups,
    NORM: tl.constexpr, NEED_WEIGHT: tl.constexpr, D: tl.constexpr, ROTATED: tl.constexpr, STEP: tl.constexpr,
    APART: tl.constexpr, HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    partial_row = partial_ptr + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + group) * D
    if group < q_groups:
        _group_backward(
            dq_ptr, dqx_ptr, q_ptr, cos_ptr, sin_ptr, qw_ptr, partial_row, group, q_heads,
            dq_stride, dqx_stride, q_stride, eps, weight_offset,
            NORM, NEED_WEIGHT, D, ROTATED, STEP, APART, HEADS, HALF_BLOCK, REST_BLOCK,
        )  # fmt: skip
    else:
        _group_backward(
            dk_ptr, dkx_ptr, k_ptr, cos_ptr, sin_ptr, kw_ptr, partial_row, group - q_groups, k_heads,
            dk_stride, dkx_stride, k_stride, eps, weight_offset,
            NORM, NEED_WEIGHT, D, ROTATED, STEP, APART, HEADS, HALF_BLOCK, REST_BLOCK,
        )  # fmt: skip


@triton.jit
def _adapted(
    q_ptr, k_ptr, v_ptr, qy_ptr, ky_ptr, vy_ptr, cos_ptr, sin_ptr, xa0, xa1, xa2, b0, b1, b2, s0, s1, s2, r0, r1, r2,
    q_heads, k_heads, q_stride, k_stride, v_stride, qy_stride, ky_stride, vy_stride,
    xa_stride0, xa_stride1, xa_stride2, tokens, q_groups, k_groups,
    D: tl.constexpr, ROTATED: tl.constexpr, STEP: tl.constexpr, APART: tl.constexpr, HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, HEADS: tl.constexpr, STAGES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Up to HEADS heads of q, k or v for BT tokens in turn: x + s · XA Bᵀ, rotated unless it is v (angle 0).

    The angles and XA are read once for all of them: at one head a program they are more than x itself.
    """
    group = tl.program_id(0)
    zero = group * 0  # makes tensors of numbers that may be constants, so that the branches agree
    half: tl.constexpr = ROTATED // 2
    turned = zero + half  # columns of each half that turn: none of v's
    x_ptr, xa_ptr, b_ptr, scaling, heads = q_ptr, xa0, b0, zero + s0, zero + q_heads
    rank, stride, xa_stride = zero + r0, zero + q_stride, zero + xa_stride0
    y_ptr, y_stride = qy_ptr, zero + qy_stride
    if group >= q_groups + k_groups:
        x_ptr, xa_ptr, b_ptr, scaling, heads = v_ptr, xa2, b2, zero + s2, zero + k_heads
        rank, stride, xa_stride = zero + r2, zero + v_stride, zero + xa_stride2
        y_ptr, y_stride = vy_ptr, zero + vy_stride
        group, turned = group - (q_groups + k_groups), zero
    elif group >= q_groups:
        x_ptr, xa_ptr, b_ptr, scaling, heads = k_ptr, xa1, b1, zero + s1, zero + k_heads
        rank, stride, xa_stride = zero + r1, zero + k_stride, zero + xa_stride1
        y_ptr, y_stride = ky_ptr, zero + ky_stride
        group = group - q_groups
    start = tl.program_id(1).to(tl.int64) * BT
    row, column, r = tl.arange(0, BT), tl.arange(0, HALF_BLOCK), tl.arange(0, R)
    place = column * STEP
    known_row, known, known_rank = row < tokens - start, column < half, r < rank
    inside = known_row[:, None] & known[None, :]
    angle = start * ROTATED + row[:, None] * ROTATED + place[None, :]
    turns = known_row[:, None] & (column < turned)[None, :]
    cos_first = tl.load(cos_ptr + angle, mask=turns, other=1.0)
    cos_second = tl.load(cos_ptr + angle + APART, mask=turns, other=1.0)
    sin_first = tl.load(sin_ptr + angle, mask=turns, other=0.0)
    sin_second = tl.load(sin_ptr + angle + APART, mask=turns, other=0.0)
    xa = tl.load(
        xa_ptr + start * xa_stride + row[:, None] * xa_stride + r[None, :],
        mask=known_row[:, None] & known_rank[None, :], other=0.0,
    )  # fmt: skip
    b_at = place[:, None] * rank + r[None, :]
    b_known = known[:, None] & known_rank[None, :]
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    last = tl.minimum(group * HEADS + HEADS, heads)
    for head in tl.range(group * HEADS, last, num_stages=STAGES):
        at = x_ptr + start * stride + row[:, None] * stride + head * D + place[None, :]
        b_head = b_ptr + head * D * rank
        first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(at + APART, mask=inside, other=0.0).to(tl.float32)
        b_first = tl.load(b_head + b_at, mask=b_known, other=0.0)
        b_second = tl.load(b_head + APART * rank + b_at, mask=b_known, other=0.0)
        first += dot(xa, tl.trans(b_first), WIDE) * scaling
        second += dot(xa, tl.trans(b_second), WIDE) * scaling
        turned_first = first * cos_first.to(tl.float32) - second * sin_first.to(tl.float32)
        turned_second = second * cos_second.to(tl.float32) + first * sin_second.to(tl.float32)
        to = y_ptr + start * y_stride + row[:, None] * y_stride + head * D + place[None, :]
        tl.store(to, turned_first.to(dtype), mask=inside)
        tl.store(to + APART, turned_second.to(dtype), mask=inside)
        if REST_BLOCK > 0:
            beyond = ROTATED + tl.arange(0, REST_BLOCK)
            rest_known = beyond < D
            rest_inside = known_row[:, None] & rest_known[None, :]
            rest_at = x_ptr + start * stride + row[:, None] * stride + head * D + beyond[None, :]
            rest = tl.load(rest_at, mask=rest_inside, other=0.0).to(tl.float32)
            b_rest = tl.load(
                b_head + beyond[:, None] * rank + r[None, :],
                mask=rest_known[:, None] & known_rank[None, :], other=0.0,
            )  # fmt: skip
            rest += dot(xa, tl.trans(b_rest), WIDE) * scaling
            to = y_ptr + start * y_stride + row[:, None] * y_stride + head * D + beyond[None, :]
            tl.store(to, rest.to(dtype), mask=rest_inside)


def adapted_config(tokens: int, heads: int, kv_heads: int) -> dict[str, int]:
    """Tiles of 32 tokens and four heads one after the other, fewer where that leaves few programs."""
    block = 32 if tokens > 16 else 16
    each = 4
    while each > 1 and triton.cdiv(tokens, block) * (heads + 2 * kv_heads) < 256 * each:
        each //= 2
    return {"BT": block, "HEADS": each, "STAGES": 3, "num_warps": 4}


def _heads_packed(x: Tensor) -> Tensor:
    """x [T, N, D] with heads and elements contiguous inside a token; tokens may be strided."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def rope_config(heads: int, kv_heads: int) -> dict[str, int]:
    """Heads a program holds at once: cos and sin are used again against more registers (8 × 128 fp32 = 4 KiB)."""
    return {"HEADS": 8, "num_warps": 4}


def places(rotated: int, pairs: bool) -> dict[str, int]:
    """Where elements that turn together lie: the first of pair c at c · STEP, the second APART from it."""
    return {"STEP": 2, "APART": 1} if pairs else {"STEP": 1, "APART": rotated // 2}


def rope_blocks(head_dim: int, rotated: int, pairs: bool) -> dict[str, int]:
    rest = head_dim - rotated
    return {
        **places(rotated, pairs),
        "D": head_dim,
        "ROTATED": rotated,
        "HALF_BLOCK": triton.next_power_of_2(rotated // 2),
        "REST_BLOCK": triton.next_power_of_2(rest) if rest else 0,
    }


def forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    weight_offset: float,
    inplace: bool,
    pairs: bool,
) -> tuple[Tensor, Tensor]:
    if inplace and not (_heads_packed(q) is q and _heads_packed(k) is k):
        raise ValueError("in place needs heads and elements contiguous inside a token")
    q, k = _heads_packed(q), _heads_packed(k)
    cos, sin = cos.contiguous(), sin.contiguous()
    q_out, k_out = (q, k) if inplace else (torch.empty(q.shape, dtype=q.dtype, device=q.device),
                                           torch.empty(k.shape, dtype=k.dtype, device=k.device))  # fmt: skip
    tokens, q_heads, head_dim = q.shape
    config = rope_config(q_heads, k.shape[1])
    q_groups, k_groups = triton.cdiv(q_heads, config["HEADS"]), triton.cdiv(k.shape[1], config["HEADS"])
    if tokens:
        _forward[(tokens, q_groups + k_groups)](
            q, k, q_out, k_out, cos, sin, q if q_weight is None else q_weight, k if k_weight is None else k_weight,
            q_heads, k.shape[1], q.stride(0), k.stride(0), q_out.stride(0), k_out.stride(0),
            eps, weight_offset, q_groups,
            NORM=q_weight is not None, **rope_blocks(head_dim, cos.shape[-1], pairs), **config,
        )  # fmt: skip
    return q_out, k_out


def adapted_rope_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    adapters: tuple[LowRank | None, LowRank | None, LowRank | None],
    into: tuple[Tensor, Tensor, Tensor] | None,
    pairs: bool,
) -> None:
    ys = into or (q, k, v)
    if any(_heads_packed(x) is not x for x in (q, k, v, *ys)):
        raise ValueError("in place needs heads and elements contiguous inside a token")
    cos, sin = cos.contiguous(), sin.contiguous()
    tokens, heads, head_dim = q.shape
    rotated = cos.shape[-1]
    given = next((adapter for adapter in adapters if adapter is not None), None)
    xas = [unit_rows((adapter or given).xa) if given else q for adapter in adapters]
    bs = [(adapter or given).b.contiguous() if given else q for adapter in adapters]
    ranks = [adapter.b.shape[1] if adapter else 0 for adapter in adapters]
    scalings = [float(adapter.scaling) if adapter else 0.0 for adapter in adapters]
    config = adapted_config(tokens, heads, k.shape[1])
    q_groups, k_groups = triton.cdiv(heads, config["HEADS"]), triton.cdiv(k.shape[1], config["HEADS"])
    if tokens:
        _adapted[(q_groups + 2 * k_groups, triton.cdiv(tokens, config["BT"]))](
            q, k, v, *ys, cos, sin, *xas, *bs, *scalings, *ranks, heads, k.shape[1],
            q.stride(0), k.stride(0), v.stride(0), *[y.stride(0) for y in ys],
            *[xa.stride(0) for xa in xas], tokens, q_groups, k_groups,
            **places(rotated, pairs), D=head_dim, ROTATED=rotated,
            HALF_BLOCK=max(triton.next_power_of_2(rotated // 2), LEAST_RANK),
            REST_BLOCK=max(triton.next_power_of_2(head_dim - rotated), LEAST_RANK) if rotated < head_dim else 0,
            R=rank_block(ranks), WIDE=is_wide(q), **config,
        )  # fmt: skip


def backward(
    dq: Tensor,
    dk: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: tuple[Tensor, Tensor, Tensor, Tensor, float, float] | None,
    need_weight_grad: bool,
    inplace: bool,
    pairs: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    packed_q, packed_k = _heads_packed(dq), _heads_packed(dk)
    cos, sin = cos.contiguous(), sin.contiguous()
    # A copy made here is ours to write to; the caller's tensor is only when it says so.
    out_q = (
        packed_q if inplace or packed_q is not dq else torch.empty(dq.shape, dtype=dq.dtype, device=dq.device)
    )
    out_k = (
        packed_k if inplace or packed_k is not dk else torch.empty(dk.shape, dtype=dk.dtype, device=dk.device)
    )
    need_weight_grad = need_weight_grad and norm is not None
    q, k, q_weight, k_weight, eps, weight_offset = norm or (packed_q, packed_k, packed_q, packed_k, 0.0, 0.0)
    q, k = _heads_packed(q), _heads_packed(k)
    tokens, q_heads, head_dim = dq.shape
    config = rope_config(q_heads, dk.shape[1])
    q_groups, k_groups = triton.cdiv(q_heads, config["HEADS"]), triton.cdiv(dk.shape[1], config["HEADS"])
    groups = q_groups + k_groups
    partial = torch.empty(
        tokens if need_weight_grad else 0, groups, head_dim, dtype=torch.float32, device=dq.device
    )
    if tokens:
        _backward[(tokens, groups)](
            packed_q, packed_k, out_q, out_k, q, k, cos, sin, q_weight, k_weight, partial,
            q_heads, dk.shape[1], packed_q.stride(0), packed_k.stride(0), out_q.stride(0), out_k.stride(0),
            q.stride(0), k.stride(0), eps, weight_offset, q_groups,
            NORM=norm is not None, NEED_WEIGHT=need_weight_grad, **rope_blocks(head_dim, cos.shape[-1], pairs),
            **config,
        )  # fmt: skip
    if not need_weight_grad:
        return out_q, out_k, None, None
    summed = partial.sum(0)
    return out_q, out_k, summed[:q_groups].sum(0), summed[q_groups:].sum(0)
