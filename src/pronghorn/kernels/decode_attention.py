"""Attention of one new token a sequence over keys and values kept in blocks (PagedAttention, arXiv 2309.06180).

    q, k = rotate(norm(q)), rotate(norm(k));   cache[position] = k, v
    out[b, n] = Σ_j softmax_j(scale · q[b, n]·K[j, n//G]) V[j, n//G],   j ≤ position, position - j < window

A head's sink is one more logit in the softmax's sum, without a value.

Rotation, the cache's new entry and attention are one call, which is one launch on a GPU.

Shapes: B sequences, N heads, K key/value heads, G = N / K, D head size; qkv [B, (N + 2K)·D] as the projections give it;
cache [blocks, tokens a block, 2, K, D], keys before values; out [B, N·D].
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pronghorn.kernels.attention.sinks import softmax_with_sinks
from pronghorn.kernels.dispatch import Impl, math_dtype, use_triton

Derived = TypeVar("Derived")


@dataclass(frozen=True)
class Heads:
    """What one layer's attention is made of.

    Args:
        scale: factor of the logits.
        window: how many tokens one sees, itself included; None: all.
        q_norm, k_norm: [D] of the RMSNorm of each head before the rotation, both or neither.
        eps, norm_offset: of those norms.
        softcap: logits become softcap · tanh(logits / softcap).
        sinks: [N], a logit of each head that takes part in the softmax's sum and has no value.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 1e-6
    norm_offset: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def entry(self) -> tuple[int, ...]:
        """The shape of what the cache holds of a token."""
        return 2, self.kv_heads, self.head_dim


@dataclass(frozen=True)
class Rotation:
    """cos and sin [positions, Drot] of every position; head elements from Drot on are not rotated.

    Args:
        switch: contexts of more tokens have other angles, of all positions: the rows from `switch` on. None: all have
            the same.
        pairs: neighbouring elements are turned, not halves.
    """

    cos: Tensor
    sin: Tensor
    switch: int | None = None
    pairs: bool = False

    def first_row(self, length: int) -> int:
        """The row of position 0 in a context of `length` tokens."""
        return 0 if self.switch is None or length <= self.switch else self.switch


@dataclass(frozen=True)
class Paged:
    """Which blocks hold the context of each sequence. Make a new object for every step on the host.

    Args:
        tables: int32 [B, most blocks], the blocks of each sequence in order.
        lengths: int32 [B], tokens of each context, the new one included; 0 where a row holds no sequence.
        host: the blocks and length of every row, where the host knows them.
        states: int32 [B], the slots of what recurrent layers remember; None where there are none.
    """

    tables: Tensor
    lengths: Tensor
    host: Sequence[tuple[Sequence[int], int]] | None = None
    states: Tensor | None = None
    _derived: dict[Hashable, object] = field(default_factory=dict, init=False, repr=False, compare=False)

    def on_host(self) -> Sequence[tuple[Sequence[int], int]]:
        """(blocks, length) of every row."""
        if self.host is None:
            rows = zip(self.tables.tolist(), self.lengths.tolist(), strict=True)
            return self._kept("host", lambda: list(rows))
        return self.host

    def rotation(self, table: Rotation) -> tuple[Tensor, Tensor]:
        """(cos, sin) [B, 1, Drot] of the new tokens, sin with the sign of what it multiplies."""

        def make() -> tuple[Tensor, Tensor]:
            rows = (self.lengths.long() - 1).clamp_(min=0)
            if table.switch is not None:
                rows += (self.lengths > table.switch) * table.switch
            cos, sin = table.cos[rows], table.sin[rows].clone()
            (sin[:, ::2] if table.pairs else sin[:, : sin.shape[1] // 2]).neg_()
            return cos[:, None], sin[:, None]

        return self._kept(("rotation", id(table)), make)

    def places(self, block_tokens: int) -> tuple[Tensor, Tensor]:
        """Rows that hold a sequence, and where in a cache of [blocks · tokens] their new tokens go; int64 both."""

        def make() -> tuple[Tensor, Tensor]:
            rows = [row for row, (_, length) in enumerate(self.on_host()) if length]
            at = []
            for row in rows:
                blocks, length = self.on_host()[row]
                at.append(blocks[(length - 1) // block_tokens] * block_tokens + (length - 1) % block_tokens)
            rows_and_places = torch.tensor([rows, at], dtype=torch.int64, device=self.lengths.device)
            return rows_and_places[0], rows_and_places[1]

        return self._kept("places", make)

    def _kept(self, name: Hashable, make: Callable[[], Derived]) -> Derived:
        """What `make` gives, made once: layers of a step ask for the same."""
        if name not in self._derived:
            self._derived[name] = make()
        return cast(Derived, self._derived[name])


def decode_attention(
    qkv: Tensor,
    cache: Tensor,
    paged: Paged,
    heads: Heads,
    rotation: Rotation,
    *,
    impl: Impl | None = None,
) -> Tensor:
    """out [B, N·D] in qkv's dtype for qkv [B, (N + 2K)·D], which may be overwritten; the cache takes k and v in.

    Rows that hold no sequence are undefined.
    """
    if use_triton(qkv, impl):
        from pronghorn.kernels.triton.decode_attention import decode_attention as by_triton

        return by_triton(qkv, cache, paged.tables, paged.lengths, heads, rotation)
    batch, size = qkv.shape[0], heads.head_dim
    by_head = qkv.view(batch, heads.heads + 2 * heads.kv_heads, size)
    turned = by_head[:, : heads.heads + heads.kv_heads]
    _normalise_(turned, heads)
    _rotate_(turned, *paged.rotation(rotation), rotation.pairs)
    rows, places = paged.places(cache.shape[1])
    new = by_head[:, heads.heads :].view(batch, 2, heads.kv_heads, size)
    cache.view(-1, *cache.shape[2:]).index_copy_(0, places, new if len(rows) == batch else new[rows])
    outs = []
    for row, (blocks, length) in enumerate(paged.on_host()):
        q = by_head[row, : heads.heads]
        attended = _attend(q, gather_context(cache, blocks, length, heads.window), heads) if length else q
        outs.append(attended.reshape(1, -1))
    return outs[0] if batch == 1 else torch.cat(outs)


def gather_context(
    cache: Tensor,
    blocks: Sequence[int],
    length: int,
    window: int | None = None,
    *,
    table: Tensor | None = None,
) -> Tensor:
    """The last `window` of a sequence's keys and values [length, 2, K, D]; a view where its blocks are neighbours.

    Args:
        table: the blocks on the cache's device, where they have been sent there.
    """
    size = cache.shape[1]
    begin = 0 if window is None else max(0, length - window)
    first, last = begin // size, -(-length // size)
    wanted = blocks[first:last]
    if all(after == before + 1 for before, after in pairwise(wanted)):
        found = cache[wanted[0] : wanted[0] + len(wanted)]
    else:
        found = cache[torch.tensor(wanted, device=cache.device) if table is None else table[first:last]]
    return found.flatten(0, 1)[begin - first * size : length - first * size]


def _attend(q: Tensor, context: Tensor, heads: Heads) -> Tensor:
    """One token's heads [N, D] over its context [L, 2, K, D] -> [N, D]; queries that share a key head are rows."""
    grouped = q.view(1, heads.kv_heads, -1, heads.head_dim)
    k, v = context[:, 0].transpose(0, 1)[None], context[:, 1].transpose(0, 1)[None]
    if heads.softcap is None and heads.sinks is None:
        return F.scaled_dot_product_attention(grouped, k, v, scale=heads.scale).reshape(q.shape)
    dtype = math_dtype(q.dtype)
    logits = grouped.to(dtype) @ k.to(dtype).transpose(-1, -2) * heads.scale
    if heads.softcap is not None:
        logits = logits.div_(heads.softcap).tanh_().mul_(heads.softcap)
    sinks = None if heads.sinks is None else heads.sinks.view(heads.kv_heads, -1, 1)
    return (softmax_with_sinks(logits, sinks) @ v.to(dtype)).to(q.dtype).reshape(q.shape)


def _normalise_(turned: Tensor, heads: Heads) -> None:
    """The RMSNorm of every head of q and k [B, N + K, D], in place."""
    if heads.q_norm is None or heads.k_norm is None:
        return
    parts = turned[:, : heads.heads], turned[:, heads.heads :]
    for part, weight in zip(parts, (heads.q_norm, heads.k_norm), strict=True):
        dtype = math_dtype(part.dtype)
        scale = weight.to(dtype) + heads.norm_offset
        part.copy_(F.rms_norm(part.to(dtype), (heads.head_dim,), scale, heads.eps))


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> None:
    """x cos + (what turns with x) sin of the first Drot elements of every head, in place; `sin` is signed."""
    width = cos.shape[-1]
    part = x if width == x.shape[-1] else x[..., :width]
    dtype = math_dtype(x.dtype) if cos.dtype != x.dtype else x.dtype
    wide = part.to(dtype)
    other = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if pairs else wide.roll(width // 2, -1)
    part.copy_((wide * cos).addcmul_(other, sin.to(dtype)))
