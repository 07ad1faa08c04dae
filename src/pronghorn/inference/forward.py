"""The decoder over new tokens whose context lies in blocks: prompts as one packed stream, or one token a sequence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from pronghorn.blocks import Norm
from pronghorn.inference.decoder import Decoder, Layer
from pronghorn.inference.latent import LatentHeads, adapter_of_rows
from pronghorn.inference.mixture import Mixture
from pronghorn.inference.moving import on_device
from pronghorn.inference.paging import BLOCK_TOKENS
from pronghorn.inference.projections import Group, Segment, Table, normalised
from pronghorn.inference.recurrent import DeltaNet, NewTokens, States
from pronghorn.kernels.attention import AttentionCall, Documents, attention_forward
from pronghorn.kernels.attention.context import attend_to_context
from pronghorn.kernels.cached_rope import rope_into_cache
from pronghorn.kernels.decode_attention import Paged, Rotation, decode_attention, gather_context
from pronghorn.kernels.glu import glu_forward
from pronghorn.weights.operand import as_operand

#: [T, Σ(q, k, v)] of a layer, before the rotation, and of a recurrent layer its gates -> [T, N·D]
Attend = Callable[[int, Layer, Tensor, Tensor | None], Tensor]


class Cache:
    """Keys and values of every layer, [blocks, tokens a block, 2, K, D]; of latent attention codes, [..., R + P].
    Recurrent layers have none, and states by slot instead."""

    def __init__(self, decoder: Decoder, blocks: int, slots: int) -> None:
        self.blocks, self.slots = blocks, slots
        self.states: dict[int, States] = {
            index: layer.heads.states(slots, decoder.dtype)
            for index, layer in enumerate(decoder.layers)
            if isinstance(layer.heads, DeltaNet)
        }
        self.layers = [
            torch.empty(0)
            if isinstance(layer.heads, DeltaNet)
            else torch.zeros(
                # Of codes one more, for rows that hold no sequence.
                blocks + isinstance(layer.heads, LatentHeads), BLOCK_TOKENS, *layer.heads.entry,
                dtype=decoder.dtype, device=decoder.device,
            )
            for layer in decoder.layers
        ]  # fmt: skip


def cache_bytes_per_token(decoder: Decoder) -> int:
    """What a token takes in all layers."""
    entries = [layer.heads.entry for layer in decoder.layers if not isinstance(layer.heads, DeltaNet)]
    return sum(map(math.prod, entries)) * decoder.dtype.itemsize


def state_bytes_per_sequence(decoder: Decoder) -> int:
    """What a sequence takes in all recurrent layers, however long it is."""
    heads = [layer.heads for layer in decoder.layers]
    return sum(held.state_bytes(decoder.dtype) for held in heads if isinstance(held, DeltaNet))


@dataclass(frozen=True)
class Part:
    """New tokens of one sequence in a packed stream: positions `begin` to `begin + count` of a context in `blocks`,
    which will have `length` tokens when all parts are done, and whose states lie in slot `state`."""

    begin: int
    count: int
    blocks: Sequence[int]
    length: int
    state: int = 0


def prefill(
    decoder: Decoder, cache: Cache, ids: Sequence[int], parts: Sequence[Part], adapter: str | None
) -> Tensor:
    """Put tokens [T] of several sequences into the cache; the last hidden state of each [n, H], before the final norm.

    All sequences take the same adapter.
    """
    attend = PackedAttention(decoder, cache, parts, adapter)
    x = decoder.embed(on_device(ids, torch.int64, decoder.device))
    x = run_layers(decoder, x, [Segment(adapter, slice(0, len(ids)))], attend)
    return x.index_select(0, attend.last_rows)


def decode(decoder: Decoder, cache: Cache, ids: Tensor, paged: Paged, segments: Sequence[Segment]) -> Tensor:
    """Hidden states [B, H] of one new token a sequence, before the final norm."""
    latent = any(isinstance(layer.heads, LatentHeads) for layer in decoder.layers)
    slots = slots_of(decoder, segments, len(ids)) if latent and decoder.adapters else None

    def attend(index: int, layer: Layer, qkv: Tensor, gates: Tensor | None) -> Tensor:
        rotation, heads = decoder.rotations[layer.rotation], layer.heads
        if isinstance(heads, DeltaNet):
            assert gates is not None and paged.states is not None
            return heads.decode(qkv, gates, cache.states[index], paged.states)
        if isinstance(heads, LatentHeads):
            adapter = None
            if slots is not None:
                adapter = adapter_of_rows(Table.of(heads.kv_up, decoder.adapters), slots)
            return heads.decode(
                qkv,
                cache.layers[index],
                paged,
                rotation,
                lambda group, y: group.forward(y, segments),
                adapter,
            )
        return decode_attention(qkv, cache.layers[index], paged, heads, rotation)

    return run_layers(decoder, decoder.embed(ids), segments, attend)


def logits_of(decoder: Decoder, x: Tensor, segments: Sequence[Segment]) -> Tensor:
    """[n, V] in fp32 for hidden states [n, H]."""
    normed = normalised(decoder.norm, x, decoder.residual_dtype, decoder.head)
    scales = decoder.scales
    logits = decoder.head.forward(normed, segments)
    logits = logits if scales.logits == 1.0 else logits * scales.logits
    logits = logits.float()
    if scales.logit_softcap is not None:
        logits = torch.tanh(logits / scales.logit_softcap) * scales.logit_softcap
    return logits


def run_layers(decoder: Decoder, x: Tensor, segments: Sequence[Segment], attend: Attend) -> Tensor:
    """All layers over x [T, H]."""
    slots = None
    if decoder.adapts_experts and any(segment.adapter is not None for segment in segments):
        slots = slots_of(decoder, segments, len(x))
    for index, layer in enumerate(decoder.layers):
        normed = normalised(layer.norm, x, decoder.dtype, layer.qkv)
        qkv, gate = layer.apart(layer.qkv.forward(normed, segments))
        gates = layer.heads.gates.forward(normed, segments) if isinstance(layer.heads, DeltaNet) else None
        attended = layer.opened(attend(index, layer, qkv, gates), gate)
        # Made before the attention is added to x, where the MLP is beside it.
        beside = None if layer.mlp_norm is not None else _activated(decoder, x, layer, segments)
        x = _add_branch(decoder, x, attended, layer.o, layer.attention_output_norm, segments)
        if isinstance(layer.mlp, Mixture) and layer.mlp_norm is not None:
            normed = as_operand(normalised(layer.mlp_norm, x, decoder.dtype, layer.mlp.router)).tensor
            x = layer.mlp.add_to(x, normed, slots, lambda group, y: group.forward(y, segments))
            continue
        act = _activated(decoder, x, layer, segments) if beside is None else beside
        x = _add_branch(decoder, x, act, layer.mlp.groups[1], layer.mlp_output_norm, segments)
    return x


def slots_of(decoder: Decoder, segments: Sequence[Segment], tokens: int) -> Tensor:
    """int64 [T]: the adapter's slot of each token."""
    slots = [0] * tokens
    for segment in segments:
        count = segment.rows.stop - segment.rows.start
        slots[segment.rows] = [decoder.slot(segment.adapter)] * count
    return on_device(slots, torch.int64, decoder.device)


def _add_branch(
    decoder: Decoder, x: Tensor, y: Tensor, group: Group, norm: Norm | None, segments: Sequence[Segment]
) -> Tensor:
    """x + scale · norm(group(y)), written over x where nothing comes between."""
    scale = decoder.scales.residual
    if norm is None and scale == 1.0 and x.dtype == y.dtype:
        return group.add_to_(x, y, segments)
    branch = group.forward(y, segments)
    if norm is not None:
        branch = norm.forward(branch, decoder.dtype)[0].tensor
    return torch.add(x, branch, alpha=scale).to(x.dtype)


def _activated(decoder: Decoder, x: Tensor, layer: Layer, segments: Sequence[Segment]) -> Tensor:
    """act(gate) · up [T, I] of a layer's gate and up."""
    gate_up = layer.mlp.groups[0]
    wide = gate_up.forward(normalised(layer.mlp_norm or layer.norm, x, decoder.dtype, gate_up), segments)
    gate, up = wide.chunk(2, 1)
    if wide.device.type == "cpu" and decoder.activation == "silu" and len(wide) <= 16:
        return F.silu(gate).mul_(up)
    return glu_forward(gate, up, decoder.activation)


class PackedAttention:
    """Attention of new tokens of several sequences, whose contexts may hold tokens from before."""

    def __init__(self, decoder: Decoder, cache: Cache, parts: Sequence[Part], adapter: str | None) -> None:
        self.decoder, self.cache, self.parts, self.adapter = decoder, cache, parts, adapter
        device = decoder.device
        ends = list(accumulate(part.count for part in parts))
        self.slices = [slice(end - part.count, end) for part, end in zip(parts, ends, strict=True)]
        self.last_rows = on_device([end - 1 for end in ends], torch.int64, device)
        positions = [torch.arange(part.begin, part.begin + part.count) for part in parts]
        places = [
            torch.tensor(part.blocks)[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS
            for part, p in zip(parts, positions, strict=True)
        ]
        self.places = on_device(torch.cat(places), torch.int64, device)
        self.angles = {kind: self._angles(table, positions) for kind, table in decoder.rotations.items()}
        lengths = tuple(part.count for part in parts)
        offsets = on_device((0, *ends), torch.int32, device)
        self.docs = Documents(offsets, max(lengths), lengths)
        self.continues = any(part.begin for part in parts)
        if self.continues:
            # Once for all layers: a copy from the host that is not pinned waits for the GPU.
            contexts = accumulate((part.begin + part.count for part in parts), initial=0)
            self.ends = on_device([list(contexts), [0, *ends]], torch.int32, device)
            self.tables = [on_device(part.blocks, torch.int64, device) for part in parts]
        if decoder.recurrent:
            slots = on_device([part.state for part in parts], torch.int64, device)
            fresh = on_device([part.begin == 0 for part in parts], torch.bool, device)
            self.new_tokens = NewTokens(self.docs, slots, [part.begin > 0 for part in parts], fresh)

    def _angles(self, table: Rotation, positions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """cos and sin of all tokens; of a single sequence where they lie."""
        first = [table.first_row(part.length) for part in self.parts]
        if len(first) == 1:
            begin = first[0] + self.parts[0].begin
            rows = slice(begin, begin + self.parts[0].count)
            return table.cos[rows], table.sin[rows]
        at = on_device(
            torch.cat([p + row for p, row in zip(positions, first, strict=True)]),
            torch.int64,
            self.decoder.device,
        )
        return table.cos[at], table.sin[at]

    def __call__(self, index: int, layer: Layer, qkv: Tensor, gates: Tensor | None) -> Tensor:
        heads, tokens = layer.heads, qkv.shape[0]
        if isinstance(heads, DeltaNet):
            assert gates is not None
            return heads.prefill(qkv, gates, self.cache.states[index], self.new_tokens)
        if isinstance(heads, LatentHeads):
            return self._latent(index, layer.rotation, heads, qkv)
        cached = self.cache.layers[index]
        pairs = self.decoder.rotations[layer.rotation].pairs
        q, k, v = rope_into_cache(qkv, *self.angles[layer.rotation], cached, self.places, heads, pairs=pairs)
        backend = self.decoder.attention_backend(qkv.dtype, heads.head_dim, heads.window is not None)
        call = AttentionCall(heads.scale, heads.window, backend, heads.softcap, heads.sinks)
        if self.continues:
            return attend_to_context(q, self._contexts(cached), self.slices, call, self.ends).reshape(
                tokens, -1
            )
        if backend != "flash":  # which takes columns of a wider matrix
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, _ = attention_forward(q, k, v, self.docs, call)
        return out.reshape(tokens, -1)

    def _contexts(self, cached: Tensor) -> list[Tensor]:
        """What a layer's cache holds of each sequence."""
        ends = [part.begin + part.count for part in self.parts]
        return [
            gather_context(cached, part.blocks, end, table=table)
            for part, end, table in zip(self.parts, ends, self.tables, strict=True)
        ]

    def _latent(self, index: int, rotation: str | None, heads: LatentHeads, codes: Tensor) -> Tensor:
        def project(group: Group, y: Tensor) -> Tensor:
            return group.forward(y, [Segment(self.adapter, slice(0, len(y)))])

        cos, sin = (angles[:, : heads.rope // 2] for angles in self.angles[rotation])
        q, entries = heads.read(codes, cos, sin, project)
        cached = self.cache.layers[index]
        cached.flatten(0, 1).index_copy_(0, self.places, entries)
        call = AttentionCall(
            heads.scale, None, self.decoder.attention_backend(codes.dtype, q.shape[2], False)
        )
        if not self.continues:
            k, v = heads.raised(entries, project)
            out, _ = attention_forward(q, k, v.contiguous(), self.docs, call)
            return out.reshape(len(codes), -1)
        contexts = [heads.context(entries, project) for entries in self._contexts(cached)]
        out = attend_to_context(q, contexts, self.slices, call, self.ends)
        return out[..., : heads.value].reshape(len(codes), -1)
