"""Rotation of q and k in place and the cache's new entries in Triton: a program takes a token and some heads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.decode_attention import Heads
from pronghorn.kernels.triton.rope import group_forward, rope_blocks, rope_config


@triton.jit
def _rope_into_cache(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, qw_ptr, kw_ptr, cache_ptr, places_ptr,
    q_heads, k_heads, stride, entry, eps, weight_offset, q_groups,
    NORM: tl.constexpr, D: tl.constexpr, ROTATED: tl.constexpr, STEP: tl.constexpr, APART: tl.constexpr,
    HEADS: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    if group < q_groups:
        group_forward(
            q_ptr, q_ptr, cos_ptr, sin_ptr, qw_ptr, group, q_heads, stride, stride, eps, weight_offset,
            NORM, D, ROTATED, STEP, APART, HEADS, HALF_BLOCK, REST_BLOCK,
        )  # fmt: skip
    else:
        token = tl.program_id(0).to(tl.int64)
        kv_group = group - q_groups
        own_ptr = cache_ptr + tl.load(places_ptr + token) * entry
        # Into the cache first: what is rotated in place cannot be read again.
        group_forward(
            k_ptr, own_ptr, cos_ptr, sin_ptr, kw_ptr, kv_group, k_heads, stride, 0, eps, weight_offset,
            NORM, D, ROTATED, STEP, APART, HEADS, HALF_BLOCK, REST_BLOCK,
        )  # fmt: skip
        group_forward(
            k_ptr, k_ptr, cos_ptr, sin_ptr, kw_ptr, kv_group, k_heads, stride, stride, eps, weight_offset,
            NORM, D, ROTATED, STEP, APART, HEADS, HALF_BLOCK, REST_BLOCK,
        )  # fmt: skip
        head = kv_group * HEADS + tl.arange(0, HEADS)
        d = tl.arange(0, D_BLOCK)
        at = head[:, None] * D + d[None, :]
        inside = (head[:, None] < k_heads) & (d[None, :] < D)
        v = tl.load(v_ptr + token * stride + at, mask=inside)
        tl.store(own_ptr + k_heads * D + at, v, mask=inside)


def rope_into_cache_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    places: Tensor,
    heads: Heads,
    pairs: bool,
) -> None:
    """q [T, N, D], k and v [T, K, D] are columns of one matrix."""
    tokens, q_heads, head_dim = q.shape
    k_heads = k.shape[1]
    config = rope_config(q_heads, k_heads)
    q_groups, k_groups = triton.cdiv(q_heads, config["HEADS"]), triton.cdiv(k_heads, config["HEADS"])
    if not tokens:
        return
    q_norm, k_norm = heads.q_norm, heads.k_norm
    _rope_into_cache[(tokens, q_groups + k_groups)](
        q, k, v, cos.contiguous(), sin.contiguous(), q if q_norm is None else q_norm, k if k_norm is None else k_norm,
        cache, places, q_heads, k_heads, q.stride(0), cache.stride(1), heads.eps, heads.norm_offset, q_groups,
        NORM=q_norm is not None, **rope_blocks(head_dim, cos.shape[-1], pairs),
        D_BLOCK=triton.next_power_of_2(head_dim), **config,
    )  # fmt: skip
