"""A decoding step in few launches: what a GPU runs once a token, inside a CUDA graph.

Launches a layer, up to 16 rows: norm + q, k, v + bias | rotation + cache + attention | o + residual | norm + gate, up +
activation | down + residual: five, and one more for each group with an adapter (its A; B is added in the group's own).
Bytes: every weight once, keys and values once, and a few times [B, hidden]. Llama-3.1-8B: 32 · 5 + 4 launches and
15.0 GB in bf16, which is 3.1 ms at 4.8 TB/s; Qwen2.5-1.5B: 28 · 5 + 4 and 3.1 GB, 0.64 ms. One row of plain layers in
bf16, on Hopper: two launches a layer, its attention and all that comes before the next one's (`walk`).
More rows run on torch's products, with norm and activation as kernels of their own: nine launches a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pronghorn.blocks import NoNorm, Norm
from pronghorn.inference.decoder import Decoder, Layer
from pronghorn.inference.forward import Cache
from pronghorn.inference.latent import LatentHeads, adapter_of_rows
from pronghorn.inference.mixture import ExpertTable, GatedMlp, Mixture
from pronghorn.inference.projections import Group, Table, normalised
from pronghorn.inference.recurrent import DeltaNet
from pronghorn.kernels.decode_attention import Heads, Paged, decode_attention
from pronghorn.kernels.glu import glu_forward
from pronghorn.kernels.matvec import (
    HANDED_COPIES,
    FourBit,
    RowAdapter,
    RowNorm,
    RowShare,
    adapter_down,
    adapter_up_,
    fits_few_rows,
    matvec,
    matvec_4bit,
)
from pronghorn.kernels.next_token import embed_next
from pronghorn.kernels.walk import Adapters, Meeting, Product, Walk, fits_walk, walk
from pronghorn.weights import DenseWeight, FourBitWeight, Weight
from pronghorn.weights.operand import as_operand

#: so many rows go straight through weights in 4 bits; for more, these are unpacked first (8B on an H200, tokens/s of 8
#: layers: 4,898 instead of 2,712 for 8 rows, 17,615 instead of 10,405 for 32)
MOST_ROWS_4BIT = 64
#: whether both products of one row's adapter ride in the launch of the weight's: off until it is measured with several
#: places to hand on from. With one on an H200, tokens/s: 1.5B 725 instead of 679, 8 layers of 8B 667 instead of 742
ADAPTERS_INSIDE = False


class RowGroup:
    """A group of projections for few rows, each with its own adapter."""

    def __init__(self, group: Group, names: Sequence[str], turn: Tensor) -> None:
        self.group = group
        self.table = Table.of(group, names)
        self.turn = turn
        if self.table is not None:
            places = HANDED_COPIES, self.table.a.shape[1]
            self.handed = torch.zeros(places, dtype=torch.int64, device=turn.device)
        self.dense = _dense_parts(group)
        self.four_bit = _four_bit_parts(group)

    def __call__(
        self,
        x: Tensor,
        slots: Tensor,
        *,
        norm: Norm | NoNorm | None = None,
        residual: Tensor | None = None,
        activation: str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """y [B, out], or act [B, out / 2], in the compute dtype; or the residual, which it was added to."""
        group, out_dtype = self.group, out_dtype or self.group.dtype
        if isinstance(norm, NoNorm) or (norm is not None and norm.centred):  # no product takes it in
            x, norm = norm.forward(x, group.dtype)[0].tensor, None
        row_norm = None if norm is None else RowNorm(norm.weight.detach(), norm.eps, norm.offset)
        if len(x) == 1 and x.dtype == group.dtype and (self.dense or self.four_bit):
            adapter: RowShare | RowAdapter | None
            adapter = self._inside(slots) if ADAPTERS_INSIDE else self._share(x, slots, row_norm)
            return self._as_stored(x, row_norm, adapter, residual, activation, out_dtype)
        share = self._share(x, slots, row_norm)
        if 1 < len(x) <= MOST_ROWS_4BIT and x.dtype == group.dtype and fits_few_rows(x, self.four_bit):
            if share is None:
                return self._as_stored(x, row_norm, None, residual, activation, out_dtype)
            y = self._as_stored(x, row_norm, None, residual, None, group.dtype)
        else:
            normed = x if norm is None else normalised(norm, x, group.dtype, group)
            y = group.forward(normed) if residual is None else group.add_to_(residual, normed)
        if share is not None:
            adapter_up_(y, share)
        return y if residual is not None else _activated(y, activation).to(out_dtype)

    def _share(self, x: Tensor, slots: Tensor, norm: RowNorm | None) -> RowShare | None:
        if self.table is None:
            return None
        xa = adapter_down(x, self.table.a, slots, norm)
        return RowShare(xa, self.table.b, slots, self.table.ends)

    def _inside(self, slots: Tensor) -> RowAdapter | None:
        if self.table is None:
            return None
        return RowAdapter(self.table.a, self.table.b, slots, self.table.ends, self.handed, self.turn)

    def _as_stored(
        self,
        x: Tensor,
        norm: RowNorm | None,
        share: RowShare | RowAdapter | None,
        residual: Tensor | None,
        activation: str | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """Few rows straight times the weights as they lie."""
        bias = self.group.stacked_bias
        if self.dense:
            return matvec(
                x, self.dense, norm=norm, bias=bias, share=share, residual=residual, activation=activation,
                out_dtype=out_dtype,
            )  # fmt: skip
        return matvec_4bit(
            x, self.four_bit, norm=norm, bias=bias, share=share, residual=residual, activation=activation,
            out_dtype=out_dtype,
        )  # fmt: skip


class FusedDecoder:
    """The decoder for one new token a row.

    Args:
        lost: int64 [1], counts programs that waited in vain for others of a launch (`kernels.walk.Meeting`), after
            which a step's result is worth nothing; None: no launch has programs that wait for each other.

    Raises:
        ValueError: an adapter is of a kind that tables do not hold.
    """

    def __init__(self, decoder: Decoder, lost: Tensor | None = None) -> None:
        self.decoder = decoder
        names = decoder.adapters
        self.layers = decoder.layers
        #: counts steps of one row: what programs of one launch hand each other is of this step if it says so
        self.turn = torch.zeros(1, dtype=torch.int32, device=decoder.device)
        self.head = RowGroup(decoder.head, names, self.turn)
        self._rows = {
            group: RowGroup(group, names, self.turn) for layer in self.layers for group in layer.groups
        }
        #: where all lies that a recorded step reads besides adapters
        self.weights = decoder.places()
        self.walks: Sequence[Walk] = ()
        if lost is not None:
            self.walks = self._find_walks()
            self.meeting = Meeting.beside(lost)

    def row_groups(self) -> list[RowGroup]:
        """Of all layers in order, then the head's."""
        return [*self._rows.values(), self.head]

    def tables(self) -> list[Table | ExpertTable | None]:
        """Of all groups in order, then the experts'."""
        of_experts = [table for layer in self.layers for table in layer.expert_tables]
        return [*(group.table for group in self.row_groups()), *of_experts]

    def biases(self) -> list[Tensor]:
        """Of all groups, in order: copies where biases do not lie as products take them."""
        groups = [row_group.group for row_group in self.row_groups()]
        found = [bias for group in groups for bias in (group.stacked_bias, *group.biases)]
        return [bias for bias in found if bias is not None]

    def embed(self, tokens: Tensor, given: Tensor) -> Tensor:
        """[B, H] of the tokens int32 [B] that are given, or where these are negative of `tokens` int64 [B]."""
        decoder = self.decoder
        if _is_plain(decoder.embedding):
            return decoder.scaled(embed_next(decoder.embedding.weight.detach(), tokens, given))
        return decoder.embed(torch.where(given >= 0, given.long(), tokens))

    def logits(self, x: Tensor, cache: Cache, paged: Paged, slots: Tensor) -> Tensor:
        """[B, V] for vectors [B, H] of `embed`, whose rows take the adapters in `slots`; fp32 or the compute dtype."""
        decoder = self.decoder
        if len(x) == 1 and self.walks:
            return self._walked(x, cache, paged, slots)
        if ADAPTERS_INSIDE and len(x) == 1 and decoder.adapters:
            self.turn += 1
        for index, layer in enumerate(self.layers):
            out = self._attended(x, index, layer, cache, paged, slots)
            # Made before the attention is added to x, where the MLP is beside it.
            beside = None if layer.mlp_norm is not None else self._activated(x, layer, slots)
            x = self._add_branch(x, out, self._rows[layer.o], layer.attention_output_norm, slots)
            x = self._mlp(x, layer, slots, beside)
        return self._head(x, slots)

    def _attended(
        self, x: Tensor, index: int, layer: Layer, cache: Cache, paged: Paged, slots: Tensor
    ) -> Tensor:
        """What o reads."""
        projected = self._rows[layer.qkv](x, slots, norm=layer.norm)
        heads, rotation = layer.heads, self.decoder.rotations[layer.rotation]
        if isinstance(heads, DeltaNet):
            gates = self._rows[heads.gates](x, slots, norm=layer.norm)
            assert paged.states is not None
            return heads.decode(projected, gates, cache.states[index], paged.states)
        qkv, gate = layer.apart(projected)
        if isinstance(heads, LatentHeads):
            adapter = adapter_of_rows(self._rows[heads.kv_up].table, slots)
            return heads.decode(
                qkv,
                cache.layers[index],
                paged,
                rotation,
                lambda group, y: self._rows[group](y, slots),
                adapter,
            )
        return layer.opened(decode_attention(qkv, cache.layers[index], paged, heads, rotation), gate)

    def _walked(self, x: Tensor, cache: Cache, paged: Paged, slots: Tensor) -> Tensor:
        """`logits` of one row, with all between two attentions in one launch."""
        decoder, first = self.decoder, self.layers[0]
        y = self._rows[first.qkv](x, slots, norm=first.norm)
        for layer, steps, cached in zip(self.layers, self.walks, cache.layers, strict=True):
            assert isinstance(layer.heads, Heads)
            rotation = decoder.rotations[layer.rotation]
            out = decode_attention(layer.norm_heads_(y), cached, paged, layer.heads, rotation)
            out_dtype = torch.float32 if layer is self.layers[-1] else None
            y = walk(out, x, steps, self.meeting, slots=slots, out_dtype=out_dtype)
        return self._scaled(y)

    def _find_walks(self) -> Sequence[Walk]:
        """Of every layer; none where one has more than a walk does, or weights or adapters that it does not read."""
        decoder, found = self.decoder, []
        lasts = [(layer.qkv, layer.norm) for layer in self.layers[1:]]
        for layer, last in zip(self.layers, [*lasts, (decoder.head, decoder.norm)], strict=True):
            if not (isinstance(layer.heads, Heads) and isinstance(layer.mlp, GatedMlp) and layer.mlp_norm):
                return ()
            if layer.gated or layer.attention_output_norm is not None or layer.mlp_output_norm is not None:
                return ()
            groups = (layer.o, None), (layer.mlp.gate_up, layer.mlp_norm), (layer.mlp.down, None), last
            o, gate_up, down, after = (self._product(group, norm) for group, norm in groups)
            if o is None or gate_up is None or down is None or after is None:
                return ()
            found.append(Walk(o, gate_up, down, after, decoder.activation))
        alike = decoder.residual_dtype == decoder.dtype and decoder.scales.residual == 1.0
        return found if alike and all(map(fits_walk, found)) else ()

    def _product(self, group: Group, norm: Norm | NoNorm | None) -> Product | None:
        """One step of a walk; None where weights lie apart or in few bits, or the norm is centred."""
        rows = self.head if group is self.decoder.head else self._rows[group]
        if len(rows.dense) != 1 or isinstance(norm, NoNorm) or (norm is not None and norm.centred):
            return None
        row_norm = None if norm is None else RowNorm(norm.weight.detach(), norm.eps, norm.offset)
        table = rows.table
        adapter = None if table is None else Adapters(table.a, table.b, table.ends)
        return Product(rows.dense[0], group.stacked_bias, row_norm, adapter)

    def _mlp(self, x: Tensor, layer: Layer, slots: Tensor, act: Tensor | None) -> Tensor:
        decoder, mlp = self.decoder, layer.mlp
        if isinstance(mlp, Mixture) and layer.mlp_norm is not None:
            # Router, experts and shared expert read the same norm.
            normed = as_operand(normalised(layer.mlp_norm, x, decoder.dtype, mlp.router)).tensor
            adapted = slots if layer.expert_tables else None
            return mlp.add_to(x, normed, adapted, lambda group, y: self._rows[group](y, slots))
        act = self._activated(x, layer, slots) if act is None else act
        return self._add_branch(x, act, self._rows[mlp.groups[1]], layer.mlp_output_norm, slots)

    def _activated(self, x: Tensor, layer: Layer, slots: Tensor) -> Tensor:
        """act(gate) · up of a layer's gate and up."""
        norm = layer.mlp_norm or layer.norm
        return self._rows[layer.mlp.groups[0]](x, slots, norm=norm, activation=self.decoder.activation)

    def _add_branch(self, x: Tensor, y: Tensor, group: RowGroup, norm: Norm | None, slots: Tensor) -> Tensor:
        """x + scale · norm(group(y)), written over x where nothing comes between."""
        scale = self.decoder.scales.residual
        if norm is None and scale == 1.0:
            return group(y, slots, residual=x)
        branch = group(y, slots)
        if norm is not None:
            branch = norm.forward(branch, self.decoder.dtype)[0].tensor
        return torch.add(x, branch, alpha=scale).to(x.dtype)

    def _head(self, x: Tensor, slots: Tensor) -> Tensor:
        # One row's come in fp32 for nothing; turning many rows' takes longer than to find the largest.
        wide = len(x) == 1 or self.decoder.scales.logit_softcap is not None
        out_dtype = torch.float32 if wide else None
        return self._scaled(self.head(x, slots, norm=self.decoder.norm, out_dtype=out_dtype))

    def _scaled(self, logits: Tensor) -> Tensor:
        scales = self.decoder.scales
        if scales.logits != 1.0:
            logits = logits.float() * scales.logits
        if scales.logit_softcap is not None:
            logits = torch.tanh(logits / scales.logit_softcap) * scales.logit_softcap
        return logits


def _is_plain(embedding: nn.Module) -> bool:
    """Whether an embedding gives the rows of its weight, and nothing looks at what it gives."""
    watched = embedding._forward_hooks or embedding._forward_pre_hooks
    return type(embedding) is nn.Embedding and embedding.max_norm is None and not watched


def _activated(y: Tensor, activation: str | None) -> Tensor:
    """act(gate) · up of [gate | up]; y itself without an activation."""
    if activation is None:
        return y
    gate, up = y.chunk(2, 1)
    return glu_forward(gate, up, activation)


def _dense_parts(group: Group) -> tuple[Tensor, ...]:
    """The group's weights as `matvec` takes them; none where they are stored otherwise."""
    if group.dense is not None:
        return (group.dense,) if group.dense.is_contiguous() else ()
    found = [w.weight.detach() for w in group.weights if type(w) is DenseWeight]
    fits = len(found) == len(group.weights) <= 3
    return tuple(found) if fits and all(w.is_contiguous() and w.dtype == group.dtype for w in found) else ()


def _four_bit_parts(group: Group) -> tuple[FourBit, ...]:
    """The group's weights as the 4-bit kernels take them; none where they do not."""
    parts = [_four_bit(weight) for weight in group.weights]
    found = [part for part in parts if part is not None]
    alike = len({(part.bits.blocksize, part.bits.nested is None) for part in found}) == 1
    return tuple(found) if len(found) == len(parts) <= 3 and alike else ()


def _four_bit(weight: Weight) -> FourBit | None:
    if not isinstance(weight, FourBitWeight) or weight.kept is not None:
        return None
    bits = weight.bits
    whole = bits.shape[1] % bits.blocksize == 0 and bits.blocksize % 32 == 0
    if not whole or bits.packed.data_ptr() % 4:
        return None
    return FourBit(bits, tuple(bits.code.tolist()))
