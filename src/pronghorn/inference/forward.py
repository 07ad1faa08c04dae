"""The decoder over new tokens whose context lies in blocks: prompts as one packed stream, or one token a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from pronghorn.blocks import Norm
from pronghorn.inference.decoder import Decoder, Layer
from pronghorn.inference.mixture import Mixture
from pronghorn.inference.moving import on_device
from pronghorn.inference.paging import BLOCK_TOKENS
from pronghorn.inference.projections import Group, Segment
from pronghorn.kernels.attention import AttentionCall, Documents, attention_forward
from pronghorn.kernels.attention.context import attend_to_context
from pronghorn.kernels.decode_attention import Paged, decode_attention, gather_context
from pronghorn.kernels.glu import glu_forward
from pronghorn.kernels.rope import qk_rope_forward
from pronghorn.weights import Operand
from pronghorn.weights.operand import as_operand

#: [T, Σ(q, k, v)] of a layer, before the rotation, -> [T, N·D]
Attend = Callable[[int, Layer, Tensor], Tensor]


class Cache:
    """Keys and values of every layer, [blocks, tokens a block, 2, K, D] each."""

    def __init__(self, decoder: Decoder, blocks: int) -> None:
        self.blocks = blocks
        self.layers = [
            torch.zeros(
                blocks, BLOCK_TOKENS, 2, layer.heads.kv_heads, layer.heads.head_dim,
                dtype=decoder.dtype, device=decoder.device,
            )
            for layer in decoder.layers
        ]  # fmt: skip


def cache_bytes_per_token(decoder: Decoder) -> int:
    """What a token takes in all layers."""
    heads = [layer.heads for layer in decoder.layers]
    return sum(2 * h.kv_heads * h.head_dim for h in heads) * decoder.dtype.itemsize


@dataclass(frozen=True)
class Part:
    """New tokens of one sequence in a packed stream: positions `begin` to `begin + count` of a context in `blocks`,
    which will have `length` tokens when all parts are done."""

    begin: int
    count: int
    blocks: Sequence[int]
    length: int


def prefill(
    decoder: Decoder, cache: Cache, ids: Sequence[int], parts: Sequence[Part], adapter: str | None
) -> Tensor:
    """Put tokens [T] of several sequences into the cache; the last hidden state of each [n, H], before the final norm.

    All sequences take the same adapter.
    """
    attend = _PackedAttention(decoder, cache, parts)
    x = decoder.embed(on_device(ids, torch.int64, decoder.device))
    x = run_layers(decoder, x, [Segment(adapter, slice(0, len(ids)))], attend)
    return x.index_select(0, attend.last_rows)


def decode(decoder: Decoder, cache: Cache, ids: Tensor, paged: Paged, segments: Sequence[Segment]) -> Tensor:
    """Hidden states [B, H] of one new token a sequence, before the final norm."""

    def attend(index: int, layer: Layer, qkv: Tensor) -> Tensor:
        rotation = decoder.rotations[layer.rotation]
        return decode_attention(qkv, cache.layers[index], paged, layer.heads, rotation)

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
    slots = _slots(decoder, segments, len(x))
    for index, layer in enumerate(decoder.layers):
        qkv = layer.qkv.forward(normalised(layer.norm, x, decoder.dtype, layer.qkv), segments)
        attended = attend(index, layer, layer.norm_heads_(qkv))
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


def _slots(decoder: Decoder, segments: Sequence[Segment], tokens: int) -> Tensor | None:
    """int64 [T]: the adapter's slot of each token, where experts have adapters and somebody asks for one."""
    if not decoder.adapts_experts or all(segment.adapter is None for segment in segments):
        return None
    slots = [0] * tokens
    for segment in segments:
        count = segment.rows.stop - segment.rows.start
        slots[segment.rows] = [decoder.slot(segment.adapter)] * count
    return on_device(slots, torch.int64, decoder.device)


def normalised(norm: Norm, x: Tensor, dtype: torch.dtype, consumer: Group) -> Tensor | Operand:
    """The norm of x [T, H] in `dtype`, quantised where that is what the consumer multiplies."""
    weight = consumer.stack or consumer.weights[0]
    if x.device.type == "cpu" and not weight.quantises_rows:
        # One call of torch; a few rows at a time are bound by the number of calls.
        scale = norm.weight.detach()
        if norm.centred:
            return F.layer_norm(x, (x.shape[-1],), scale, None, norm.eps).to(dtype)
        if norm.offset:
            scale = scale.float() + norm.offset
            return F.rms_norm(x.float(), (x.shape[-1],), scale, norm.eps).to(dtype)
        return F.rms_norm(x, (x.shape[-1],), scale, norm.eps).to(dtype)
    return norm.forward(x, dtype, fp8=weight.quantises_rows, int8=weight.fuses)[0]


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


class _PackedAttention:
    """Attention of new tokens of several sequences, whose contexts may hold tokens from before."""

    def __init__(self, decoder: Decoder, cache: Cache, parts: Sequence[Part]) -> None:
        self.decoder, self.cache, self.parts = decoder, cache, parts
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
        self.angles = {}
        for kind, table in decoder.rotations.items():
            rows = [p + table.first_row(part.length) for part, p in zip(parts, positions, strict=True)]
            at = on_device(torch.cat(rows), torch.int64, device)
            self.angles[kind] = table.cos[at], table.sin[at]
        lengths = tuple(part.count for part in parts)
        offsets = on_device((0, *ends), torch.int32, device)
        self.docs = Documents(offsets, max(lengths), lengths)
        self.continues = any(part.begin for part in parts)

    def __call__(self, index: int, layer: Layer, qkv: Tensor) -> Tensor:
        heads, tokens = layer.heads, qkv.shape[0]
        by_head = qkv.view(tokens, heads.heads + 2 * heads.kv_heads, heads.head_dim)
        q, k, v = by_head.split((heads.heads, heads.kv_heads, heads.kv_heads), 1)
        q, k = qk_rope_forward(
            q,
            k,
            *self.angles[layer.rotation],
            q_norm_weight=heads.q_norm,
            k_norm_weight=heads.k_norm,
            eps=heads.eps,
            weight_offset=heads.norm_offset,
            pairs=self.decoder.rotations[layer.rotation].pairs,
        )
        cached = self.cache.layers[index]
        flat = cached.flatten(0, 1)
        flat[:, 0].index_copy_(0, self.places, k)
        flat[:, 1].index_copy_(0, self.places, v)
        backend = self.decoder.binding.attention_backend(
            qkv.device, qkv.dtype, heads.head_dim, window=heads.window is not None
        )
        if backend == "cudnn" and self.decoder.binding.attention is None:
            backend = "flash"  # cuDNN builds a plan for every rough size, up to a second each: prompts vary
        call = AttentionCall(heads.scale, heads.window, backend, heads.softcap, heads.sinks)
        if not self.continues:
            out, _ = attention_forward(q, k, v.contiguous(), self.docs, call)
            return out.reshape(tokens, -1)
        contexts = [gather_context(cached, part.blocks, part.begin + part.count) for part in self.parts]
        return attend_to_context(q, contexts, self.slices, call).reshape(tokens, -1)
