"""Latent attention (DeepSeek-V2, arXiv 2405.04434) over a cache of codes: R + P numbers a token, whatever the heads.

    entry[j] = [c_j | r_j],   c = norm(code) [R],   r = R_j k_rope [P];    k_j[n] = [K_n c_j | r_j],   v_j[n] = V_n c_j

with [K_n; V_n] the rows of the projection U that belong to head n. New tokens of prompts make keys and values of the
codes. A single token goes the other way, so that the cache is read as it is:

    q·k_j = (K_nᵀ q_nope)·c_j + q_rope·r_j,   out[n] = V_n Σ_j softmax_j c_j

An adapter of U adds A and B of its own to K and V: V c + B (A c), Kᵀ q + Aᵀ (Bᵀ q).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pronghorn.blocks import Norm
from pronghorn.inference.projections import Group, Table, normalised
from pronghorn.kernels.decode_attention import Paged, Rotation
from pronghorn.kernels.dispatch import math_dtype
from pronghorn.kernels.latent_heads import rotate
from pronghorn.weights.operand import as_operand

#: a group times rows, with their adapters
Project = Callable[[Group, Tensor], Tensor]
#: numbers of contexts that are gathered at a time
MOST_GATHERED = 1 << 25


@dataclass(frozen=True)
class LatentHeads:
    """What one layer's latent attention is made of; N heads of E + P (q, k) and F (v).

    Args:
        q_norm, q_up: from a code of q to q; None where q has none.
        kv_norm, kv_up: of the code [R] of k and v. `rope`: P. `pairs`: neighbouring elements are turned, not halves.
    """

    heads: int
    nope: int
    rope: int
    scale: float
    pairs: bool
    q_norm: Norm | None
    q_up: Group | None
    kv_norm: Norm
    kv_up: Group

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.kv_up,) if self.q_up is None else (self.q_up, self.kv_up)

    @property
    def rank(self) -> int:
        return self.kv_norm.weight.shape[0]

    @property
    def value(self) -> int:
        """F."""
        return self.kv_up.widths[0] // self.heads - self.nope

    @property
    def entry(self) -> tuple[int, ...]:
        """The shape of what the cache holds of a token."""
        return (self.rank + self.rope,)

    def read(self, codes: Tensor, cos: Tensor, sin: Tensor, project: Project) -> tuple[Tensor, Tensor]:
        """q [T, N, E + P], rotated, and entries [T, R + P] of what the layer's first products give."""
        first, code = codes.split((codes.shape[1] - self.rank - self.rope, self.rank + self.rope), 1)
        if self.q_up is not None:
            assert self.q_norm is not None
            first = project(self.q_up, _normed(self.q_norm, first, self.q_up))
        q = first.reshape(len(first), self.heads, -1)
        q_rope = rotate(q[..., self.nope :], cos[:, None], sin[:, None], self.pairs)
        q = torch.cat([q[..., : self.nope], q_rope], -1)
        kept = _normed(self.kv_norm, code[:, : self.rank], self.kv_up)
        return q, torch.cat([kept, rotate(code[:, self.rank :], cos, sin, self.pairs)], 1)

    def raised(self, entries: Tensor, project: Project) -> tuple[Tensor, Tensor]:
        """k [L, N, E + P] and v [L, N, F] of entries [L, R + P]."""
        code, turned = entries.split((self.rank, self.rope), 1)
        pair = project(self.kv_up, code.contiguous()).view(len(entries), self.heads, -1)
        shared = turned[:, None].expand(-1, self.heads, -1)
        return torch.cat([pair[..., : self.nope], shared], -1), pair[..., self.nope :]

    def context(self, entries: Tensor, project: Project) -> Tensor:
        """[L, 2, N, E + P]: keys, and values with zeros behind them."""
        k, v = self.raised(entries, project)
        both = torch.stack([k, torch.zeros_like(k)], 1)
        both[:, 1, :, : v.shape[2]] = v
        return both

    def decode(
        self,
        codes: Tensor,
        cache: Tensor,
        paged: Paged,
        rotation: Rotation,
        project: Project,
        adapter: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """out [B, N·F] of one new token a row, whose entries go into the cache [blocks, tokens a block, R + P].

        The cache's last block takes in what belongs to rows without a sequence.

        Args:
            adapter: of U, a row's own A [B, r, R] and B [B, N·(E + F), r].
        """
        size, past = cache.shape[1], (paged.lengths.long() - 1).clamp_(min=0)
        at = past if rotation.switch is None else past + (paged.lengths > rotation.switch) * rotation.switch
        half = self.rope // 2
        q, entries = self.read(codes, rotation.cos[at, :half], rotation.sin[at, :half], project)
        tables = paged.tables.long()
        place = tables.gather(1, (past // size)[:, None])[:, 0] * size + past % size
        flat = cache.flatten(0, 1)
        flat.index_copy_(0, torch.where(paged.lengths > 0, place, len(flat) - 1), entries)
        up = self.kv_up.weights[0].dense(q.dtype).view(self.heads, -1, self.rank)
        wide = torch.cat([self._lowered(q[..., : self.nope], up, adapter), q[..., self.nope :]], -1)
        step = max(1, MOST_GATHERED // (tables.shape[1] * size * flat.shape[1]))
        found = [
            self._attended(wide[i : i + step], cache, tables[i : i + step], past[i : i + step])
            for i in range(0, len(q), step)
        ]
        return self._values(torch.cat(found), up, adapter).flatten(1)

    def _attended(self, q: Tensor, cache: Tensor, tables: Tensor, past: Tensor) -> Tensor:
        """Σ_j softmax_j c_j [B, N, R] for q [B, N, R + P] over the contexts in `tables`."""
        context = cache[tables].flatten(1, 2)
        dtype = math_dtype(q.dtype)
        logits = (q @ context.transpose(1, 2)).to(dtype) * self.scale
        unseen = torch.arange(context.shape[1], device=q.device) > past[:, None]
        weights = logits.masked_fill_(unseen[:, None], float("-inf")).softmax(-1)
        # What lies behind a context may be anything, and 0 times it is not always 0.
        context = context[..., : self.rank].masked_fill(unseen[..., None], 0.0)
        return weights.to(q.dtype) @ context

    def _lowered(self, q: Tensor, up: Tensor, adapter: tuple[Tensor, Tensor] | None) -> Tensor:
        """K_nᵀ q_nope [B, N, R]."""
        lowered = torch.einsum("bne,ner->bnr", q, up[:, : self.nope])
        if adapter is not None:
            a, b = adapter
            b = b.unflatten(1, (self.heads, -1))[:, :, : self.nope]
            lowered += torch.einsum("bne,bnec,bcr->bnr", q, b, a)
        return lowered

    def _values(self, sums: Tensor, up: Tensor, adapter: tuple[Tensor, Tensor] | None) -> Tensor:
        """V_n sums [B, N, F]."""
        values = torch.einsum("bnr,nfr->bnf", sums, up[:, self.nope :])
        if adapter is not None:
            a, b = adapter
            b = b.unflatten(1, (self.heads, -1))[:, :, self.nope :]
            values += torch.einsum("bnr,bcr,bnfc->bnf", sums, a, b)
        return values


def adapter_of_rows(table: Table | None, slots: Tensor) -> tuple[Tensor, Tensor] | None:
    """A and B of every row out of a group's table."""
    return None if table is None else (table.a[slots.long()], table.b[slots.long()])


def _normed(norm: Norm, code: Tensor, reader: Group) -> Tensor:
    return as_operand(normalised(norm, code.contiguous(), reader.dtype, reader)).tensor
