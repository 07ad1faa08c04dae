"""Attention of one new token a sequence in Triton: rotation, the cache's new entry and attention in one launch.

A program takes one sequence, one key/value head with all query heads that share it, and a run of the context's tiles
(flash-decoding). Its first tile was written by steps before, and is read while the kernel before this one still runs.
The first program of a head adds the new token from registers; partial results go through memory, and the last
program of a head to arrive combines them.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.decode_attention import Heads, Rotation
from pronghorn.kernels.triton.launch import dependent_launch, launch_next, processors_of, wait_for_last
from pronghorn.kernels.triton.lora import dot, is_wide

#: contexts are never longer
_NEVER = 2**31 - 1
#: the matrix units take at least so many query heads
LEAST_GROUP = 16
#: tokens of a tile; fewer take longer for one sequence, too (560 tokens at 8B on an H200: 7.8 µs, 9.4 with 32)
MOST_TILE = 64


@triton.jit
def _turned(
    x_ptr, head, d, partner, sign, cos, sin, known, weight_ptr, size, eps, offset, NORM: tl.constexpr
):
    """Heads [G, D] of q or k normalised and rotated, fp32."""
    at = head[:, None] * size
    mask = known[:, None] & (d < size)[None, :]
    x = tl.load(x_ptr + at + d[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + at + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM:
        rstd = (1.0 / tl.sqrt(tl.sum(x * x, 1) / size + eps))[:, None]
        x = x * rstd * (tl.load(weight_ptr + d, mask=d < size, other=0.0).to(tl.float32) + offset)[None, :]
        y = (
            y
            * rstd
            * (tl.load(weight_ptr + partner, mask=d < size, other=0.0).to(tl.float32) + offset)[None, :]
        )
    return x * cos[None, :] + y * (sin * sign)[None, :]


@triton.jit
def _capped(logits, softcap, CAPPED: tl.constexpr):
    if CAPPED:
        return softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
    return logits


@triton.jit
def _tile(
    cache_ptr, tables_ptr, tile, kv_head, t, d, past, begin, BLOCK_TOKENS: tl.constexpr, TILE: tl.constexpr,
    SIZE: tl.constexpr, KV_HEADS: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Keys and values [TILE, D] of a tile's tokens, and which of those are attended to."""
    position = tile * TILE + t
    seen = position < past
    if WINDOWED:
        seen = seen & (position >= begin)
    # Tiles that lie beyond the context have no block.
    block = tl.load(tables_ptr + tile * TILE // BLOCK_TOKENS, mask=tile * TILE < past, other=0)
    token = block.to(tl.int64) * BLOCK_TOKENS + position % BLOCK_TOKENS
    at = cache_ptr + token[:, None] * (2 * KV_HEADS * SIZE) + kv_head * SIZE + d[None, :]
    mask = seen[:, None] & (d < SIZE)[None, :]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + KV_HEADS * SIZE, mask=mask, other=0.0), seen


@triton.jit
def _attended(
    q, k, v, seen, top, total, sums, scale, softcap, CAPPED: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """One more tile under the running maximum, sum and output of q [G, D]."""
    logits = _capped(dot(q, tl.trans(k), WIDE) * scale, softcap, CAPPED)
    logits = tl.where(seen[None, :], logits, float("-inf"))
    higher = tl.maximum(top, tl.max(logits, 1))
    weights = tl.exp(logits - higher[:, None])
    shrink = tl.exp(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    sums = sums * shrink[:, None] + dot(weights.to(v.dtype), v, WIDE)
    return higher, total, sums


@triton.jit
def _combined(
    partial_ptr, stats_ptr, first, active, d, SHARED: tl.constexpr, QUERIES: tl.constexpr, TOGETHER: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """The partial results of one head's programs as one, [QUERIES, D]; `TOGETHER` programs' at a time.

    They are read past the first cache, which knows nothing of what other processors have written.
    """
    h = tl.arange(0, QUERIES)
    top = tl.full([QUERIES], -1.0e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, D], tl.float32)
    for start in range(0, active, TOGETHER):
        program = start + tl.arange(0, TOGETHER)
        slot = (first + program)[:, None] * SHARED + h[None, :]
        known = (program < active)[:, None] & (h < SHARED)[None, :]
        tops = tl.load(stats_ptr + 2 * slot, mask=known, other=-1.0e30, cache_modifier=".cg")
        totals = tl.load(stats_ptr + 2 * slot + 1, mask=known, other=0.0, cache_modifier=".cg")
        at = partial_ptr + slot[:, :, None] * D + d[None, None, :]
        parts = tl.load(at, mask=known[:, :, None], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(tops, 0))
        weights, shrink = tl.exp(tops - higher[None, :]), tl.exp(top - higher)
        total = total * shrink + tl.sum(weights * totals, 0)
        sums = sums * shrink[:, None] + tl.sum(weights[:, :, None] * parts, 0)
        top = higher
    return sums / tl.maximum(total, 1.0e-30)[:, None]


@triton.jit
def _decode(
    qkv_ptr, cache_ptr, tables_ptr, lengths_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, sinks_ptr,
    out_ptr, partial_ptr, stats_ptr, arrived_ptr,
    qkv_stride, table_stride, switch, scale, window, softcap, eps, offset,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, TURNED: tl.constexpr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr,
    NORM: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, PAIRS: tl.constexpr,
    WIDE: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kind: tl.constexpr = cache_ptr.dtype.element_ty
    SHARED: tl.constexpr = HEADS // KV_HEADS
    if PDL:
        launch_next()
    length = tl.load(lengths_ptr + b)
    past = length - 1
    begin = 0
    if WINDOWED:
        begin = tl.maximum(length - window, 0)
    first_tile = begin // TILE
    tiles = tl.cdiv(past, TILE) - first_tile
    each = tl.maximum(tl.cdiv(tiles, SPLITS), 1)
    active = tl.maximum(tl.cdiv(tiles, each), 1)
    d, t = tl.arange(0, D), tl.arange(0, TILE)
    inside = d < SIZE
    tables_ptr += b * table_stride
    start = first_tile + split * each
    if EARLY:
        k, v, seen = _tile(
            cache_ptr, tables_ptr, start, kv_head, t, d, past, begin, BLOCK_TOKENS, TILE, SIZE, KV_HEADS, WINDOWED
        )  # fmt: skip
    # The first TURNED elements of a head turn in pairs, that lie half of them apart or beside each other.
    half: tl.constexpr = TURNED // 2
    rotated = d < TURNED
    angle = (tl.maximum(past, 0) + tl.where(length > switch, switch, 0)) * TURNED + d
    cos = tl.load(cos_ptr + angle, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=rotated, other=0.0).to(tl.float32)
    if PDL:
        wait_for_last()
    if (length > 0) & (split < active):
        g = tl.arange(0, GROUP)
        if PAIRS:
            partner = tl.where(rotated, d ^ 1, d)
            sign = tl.where(d % 2 == 0, -1.0, 1.0)
        else:
            partner = tl.where(rotated, tl.where(d < half, d + half, d - half), d)
            sign = tl.where(d < half, -1.0, 1.0)
        row = qkv_ptr + b * qkv_stride
        q = _turned(
            row, kv_head * SHARED + g, d, partner, sign, cos, sin, g < SHARED, q_norm_ptr, SIZE, eps, offset, NORM
        ).to(kind)  # fmt: skip
        top = tl.full([GROUP], float("-inf"), tl.float32)
        total = tl.zeros([GROUP], tl.float32)
        sums = tl.zeros([GROUP, D], tl.float32)
        if split == 0:
            one = tl.arange(0, 1)
            own_k = _turned(
                row + HEADS * SIZE, kv_head + one, d, partner, sign, cos, sin, one == 0, k_norm_ptr, SIZE, eps,
                offset, NORM,
            ).to(kind)  # fmt: skip
            own_v = tl.load(row + (HEADS + KV_HEADS + kv_head) * SIZE + d, mask=inside, other=0.0).to(kind)
            block = tl.load(tables_ptr + past // BLOCK_TOKENS)
            token = block.to(tl.int64) * BLOCK_TOKENS + past % BLOCK_TOKENS
            at = token * (2 * KV_HEADS * SIZE) + kv_head * SIZE
            tl.store(cache_ptr + at + d[None, :], own_k, mask=inside[None, :])
            tl.store(cache_ptr + at + KV_HEADS * SIZE + d, own_v, mask=inside)
            top = _capped(tl.sum(q.to(tl.float32) * own_k.to(tl.float32), 1) * scale, softcap, CAPPED)
            total += 1.0
            sums += own_v.to(tl.float32)[None, :]
            if SINKS:
                sink = tl.load(sinks_ptr + kv_head * SHARED + g, mask=g < SHARED, other=0.0).to(tl.float32)
                higher = tl.maximum(top, sink)
                shrink = tl.exp(top - higher)
                top, total, sums = higher, shrink + tl.exp(sink - higher), sums * shrink[:, None]
        if EARLY:
            top, total, sums = _attended(q, k, v, seen, top, total, sums, scale, softcap, CAPPED, WIDE)
        for tile in range(start + EARLY, tl.minimum(start + each, first_tile + tiles)):
            k, v, seen = _tile(
                cache_ptr, tables_ptr, tile, kv_head, t, d, past, begin, BLOCK_TOKENS, TILE, SIZE, KV_HEADS, WINDOWED
            )  # fmt: skip
            top, total, sums = _attended(q, k, v, seen, top, total, sums, scale, softcap, CAPPED, WIDE)
        to = out_ptr + b * (HEADS * SIZE) + (kv_head * SHARED + g)[:, None] * SIZE + d[None, :]
        mine = (g < SHARED)[:, None] & inside[None, :]
        if SPLITS == 1:
            tl.store(to, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=mine)
        else:
            if active == 1:
                tl.store(to, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=mine)
            else:
                head = b * KV_HEADS + kv_head
                slot = (head * SPLITS + split) * SHARED + g
                tl.store(partial_ptr + slot[:, None] * D + d[None, :], sums, mask=(g < SHARED)[:, None])
                tl.store(stats_ptr + 2 * slot, top, mask=g < SHARED)
                tl.store(stats_ptr + 2 * slot + 1, total, mask=g < SHARED)
                tl.debug_barrier()
                before = tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel")
                if before == active - 1:
                    tl.debug_barrier()
                    y = _combined(
                        partial_ptr, stats_ptr, head * SPLITS, active, d, SHARED, QUERIES, TOGETHER, D
                    )
                    h = tl.arange(0, QUERIES)
                    whole = out_ptr + b * (HEADS * SIZE) + (kv_head * SHARED + h)[:, None] * SIZE + d[None, :]
                    there = (h < SHARED)[:, None] & inside[None, :]
                    tl.store(whole, y.to(out_ptr.dtype.element_ty), mask=there)
                    tl.store(arrived_ptr + head, 0)


def splits(batch: int, kv_heads: int, most_tiles: int, device: torch.device) -> int:
    """Programs a head: enough for one on every processor, no more than there are tiles."""
    wanted = triton.cdiv(processors_of(device), batch * kv_heads)
    return max(1, min(triton.next_power_of_2(wanted), triton.next_power_of_2(most_tiles), 64))


@cache
def _arrived(device: torch.device, batch: int, heads: int) -> Tensor:
    """Counters of programs that have arrived, zero between launches."""
    return torch.zeros(batch * heads, dtype=torch.int32, device=device)


def decode_attention(
    qkv: Tensor, cache_: Tensor, tables: Tensor, lengths: Tensor, heads: Heads, rotation: Rotation
) -> Tensor:
    batch, size = qkv.shape[0], heads.head_dim
    block_tokens = cache_.shape[1]
    tile = min(MOST_TILE, block_tokens)
    parts = splits(batch, heads.kv_heads, tables.shape[1] * block_tokens // tile, qkv.device)
    shared = heads.heads // heads.kv_heads
    queries = triton.next_power_of_2(shared)
    group = max(LEAST_GROUP, queries)
    wide = max(16, triton.next_power_of_2(size))
    out = torch.empty(batch, heads.heads * size, dtype=qkv.dtype, device=qkv.device)
    count = batch * heads.kv_heads * parts * shared
    partial = torch.empty(count * wide if parts > 1 else 0, dtype=torch.float32, device=qkv.device)
    stats = torch.empty(2 * count if parts > 1 else 0, dtype=torch.float32, device=qkv.device)
    # A tile that waits in registers costs programs their place where there are many (64 sequences of 1,060: 87 µs, 70).
    early = batch * heads.kv_heads * parts <= 2 * processors_of(qkv.device)
    pdl = dependent_launch(qkv.device)
    _decode[(batch, heads.kv_heads, parts)](
        qkv, cache_, tables, lengths, rotation.cos, rotation.sin,
        qkv if heads.q_norm is None else heads.q_norm, qkv if heads.k_norm is None else heads.k_norm,
        qkv if heads.sinks is None else heads.sinks,
        out, partial, stats, _arrived(qkv.device, batch, heads.kv_heads),
        qkv.stride(0), tables.stride(0), _NEVER if rotation.switch is None else rotation.switch,
        heads.scale, heads.window or 0, heads.softcap or 1.0, heads.eps, heads.norm_offset,
        HEADS=heads.heads, KV_HEADS=heads.kv_heads, SIZE=size, D=wide, TURNED=rotation.cos.shape[1], GROUP=group,
        QUERIES=queries, TOGETHER=max(1, min(16, 128 // queries)), BLOCK_TOKENS=block_tokens, TILE=tile,
        SPLITS=parts, NORM=heads.q_norm is not None, WINDOWED=heads.window is not None,
        CAPPED=heads.softcap is not None, SINKS=heads.sinks is not None, PAIRS=rotation.pairs,
        WIDE=is_wide(qkv), EARLY=int(early), PDL=bool(pdl),
        num_warps=4, num_stages=2, **pdl,
    )  # fmt: skip
    return out
