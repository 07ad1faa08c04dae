"""The heads of latent attention in Triton: a program takes one token and a group of heads, backward all of them in
turn, because the gradient of what they share is a sum over heads. See `kernels.latent_heads`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: elements [heads, part of a head] of a tile
TILE = 2048


@triton.jit
def _copy(
    from_row, from_head, from_column, to_row, to_head, to_column, head, heads, width, BLOCK: tl.constexpr
):
    """A part of some heads of a token: `width` columns from `from_column` on to those from `to_column` on."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = (head[:, None] < heads) & (column < width)
    value = tl.load(from_row + head[:, None] * from_head + from_column + column, mask=inside, other=0.0)
    tl.store(to_row + head[:, None] * to_head + to_column + column, value, mask=inside)


@triton.jit
def _turned(first, second, cos_row, sin_row, half, BACK: tl.constexpr, HB: tl.constexpr):
    """Both elements of the pairs [.., HB] turned by a token's angles, or turned back."""
    column = tl.arange(0, HB)
    cos = tl.load(cos_row + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_row + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    if BACK:
        sin = -sin
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _places(half, PAIRS: tl.constexpr, HB: tl.constexpr):
    """Where the first elements of the pairs are, and how far the second ones are from them."""
    column = tl.arange(0, HB)
    return (2 * column if PAIRS else column), (1 if PAIRS else half)


@triton.jit
def _turn_heads(
    row, cos_row, sin_row, head, heads, width, nope, half,
    BACK: tl.constexpr, PAIRS: tl.constexpr, HB: tl.constexpr,
):  # fmt: skip
    """Turn the ends of some heads of a token in place."""
    place, apart = _places(half, PAIRS, HB)
    at = row + head[:, None] * width + nope + place[None, :]
    inside = (head[:, None] < heads) & (tl.arange(0, HB)[None, :] < half)
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + apart, mask=inside, other=0.0).to(tl.float32)
    first, second = _turned(first, second, cos_row, sin_row, half, BACK, HB)
    dtype: tl.constexpr = row.dtype.element_ty
    tl.store(at, first.to(dtype), mask=inside)
    tl.store(at + apart, second.to(dtype), mask=inside)


@triton.jit
def _forward(
    q_ptr, pair_ptr, shared_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr,
    heads, nope, half, of_v, shared_stride, angle_stride,
    TURNS_Q: tl.constexpr, PAIRS: tl.constexpr,
    HEADS: tl.constexpr, EB: tl.constexpr, HB: tl.constexpr, FB: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    width, wide = nope + 2 * half, nope + of_v
    q_row, k_row = q_ptr + token * heads * width, k_ptr + token * heads * width
    pair_row, v_row = pair_ptr + token * heads * wide, v_ptr + token * heads * of_v
    cos_row, sin_row = cos_ptr + token * angle_stride, sin_ptr + token * angle_stride
    _copy(pair_row, wide, 0, k_row, width, 0, head, heads, nope, EB)
    _copy(pair_row, wide, nope, v_row, of_v, 0, head, heads, of_v, FB)
    if TURNS_Q:
        _turn_heads(q_row, cos_row, sin_row, head, heads, width, nope, half, False, PAIRS, HB)
    place, apart = _places(half, PAIRS, HB)
    known = (tl.arange(0, HB) < half)[None, :]
    shared = shared_ptr + token * shared_stride + place[None, :]
    first = tl.load(shared, mask=known, other=0.0).to(tl.float32)
    second = tl.load(shared + apart, mask=known, other=0.0).to(tl.float32)
    first, second = _turned(first, second, cos_row, sin_row, half, False, HB)
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    at = k_row + head[:, None] * width + nope + place[None, :]
    inside = (head[:, None] < heads) & known
    tl.store(at, tl.broadcast_to(first.to(dtype), [HEADS, HB]), mask=inside)
    tl.store(at + apart, tl.broadcast_to(second.to(dtype), [HEADS, HB]), mask=inside)


@triton.jit
def _backward(
    dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, dpair_ptr, dshared_ptr,
    heads, nope, half, of_v, dv_stride, dv_head, angle_stride,
    PAIRS: tl.constexpr, HEADS: tl.constexpr, EB: tl.constexpr, HB: tl.constexpr, FB: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    width, wide = nope + 2 * half, nope + of_v
    dq_row, dk_row = dq_ptr + token * heads * width, dk_ptr + token * heads * width
    dpair_row, dv_row = dpair_ptr + token * heads * wide, dv_ptr + token * dv_stride
    cos_row, sin_row = cos_ptr + token * angle_stride, sin_ptr + token * angle_stride
    place, apart = _places(half, PAIRS, HB)
    known = (tl.arange(0, HB) < half)[None, :]
    of_first, of_second = tl.zeros([1, HB], tl.float32), tl.zeros([1, HB], tl.float32)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        _copy(dk_row, width, 0, dpair_row, wide, 0, head, heads, nope, EB)
        _copy(dv_row, dv_head, 0, dpair_row, wide, nope, head, heads, of_v, FB)
        _turn_heads(dq_row, cos_row, sin_row, head, heads, width, nope, half, True, PAIRS, HB)
        at = dk_row + head[:, None] * width + nope + place[None, :]
        inside = (head[:, None] < heads) & known
        of_first += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float32), 0)[None, :]
        of_second += tl.sum(tl.load(at + apart, mask=inside, other=0.0).to(tl.float32), 0)[None, :]
    first, second = _turned(of_first, of_second, cos_row, sin_row, half, True, HB)
    dtype: tl.constexpr = dshared_ptr.dtype.element_ty
    to = dshared_ptr + token * 2 * half + place[None, :]
    tl.store(to, first.to(dtype), mask=known)
    tl.store(to + apart, second.to(dtype), mask=known)


def _blocks(heads: int, nope: int, half: int, of_v: int) -> dict[str, int]:
    """Sizes of the tiles: heads, and the parts of a head."""
    parts = {name: triton.next_power_of_2(n) for name, n in (("EB", nope), ("HB", half), ("FB", of_v))}
    return {"HEADS": min(triton.next_power_of_2(heads), max(1, TILE // max(parts.values()))), **parts}


def forward(
    q: Tensor | None,
    pair: Tensor,
    shared: Tensor,
    cos: Tensor,
    sin: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: bool,
) -> None:
    (tokens, heads, width), half, of_v = k.shape, cos.shape[1], v.shape[2]
    assert (
        (q is None or q.is_contiguous())
        and shared.stride(1) == 1
        and pair.is_contiguous()
        and cos.stride() == sin.stride()
    )
    nope = width - 2 * half
    blocks = _blocks(heads, nope, half, of_v)
    _forward[(tokens, triton.cdiv(heads, blocks["HEADS"]))](
        k if q is None else q, pair, shared, cos, sin, k, v,
        heads, nope, half, of_v, shared.stride(0), cos.stride(0), TURNS_Q=q is not None, PAIRS=pairs,
        **blocks, num_warps=4,
    )  # fmt: skip


def backward(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, dpair: Tensor, pairs: bool
) -> Tensor:
    """The gradient of `shared` [T, P]."""
    (tokens, heads, width), half, of_v = dq.shape, cos.shape[1], dv.shape[2]
    assert dq.is_contiguous() and dk.is_contiguous() and dv.stride(2) == 1 and cos.stride() == sin.stride()
    nope = width - 2 * half
    dshared = torch.empty(tokens, 2 * half, dtype=dk.dtype, device=dk.device)
    _backward[(tokens,)](
        dq, dk, dv, cos, sin, dpair, dshared, heads, nope, half, of_v, dv.stride(0), dv.stride(1), cos.stride(0),
        PAIRS=pairs, **_blocks(heads, nope, half, of_v), num_warps=4,
    )  # fmt: skip
    return dshared
