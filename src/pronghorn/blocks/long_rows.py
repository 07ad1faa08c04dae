"""A decoder layer on a stream so long that memory holds only a few tensors of a layer input's size.

The usual order of work has nine of them at once (Llama-3.1-8B: 70 KB a token). Only attention itself needs all rows:

    forward   q, k, v of norm(x); out = attention(q, k, v); then by tiles of rows y = x + o(out), y + glu(norm(y))
    backward  q, k, v, out again; by tiles y again and dy, which is written over the gradient of the layer's output;
              by groups of heads the columns of dout = dy W_o, attention's backward, dq, dk, dv over q, k, v;
              by tiles the input gradient of q, k, v and the norm's, over dy

so that besides x and the gradient there are q, k, v, out, and one tile or one group of heads (49 KB). The products are
the same ones, each made as often as before; adapters' gradients are summed over tiles in fp32.

Where tiles are short, memory is short: q, k and v are then let go of before dy and made again for each group of heads,
by the same kernels from the same rows, and dq is written over out (42 KB; by count 0.5 % of the time of 300,000
tokens). So it is where norms of q and k want these as they were before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pronghorn.blocks.attention import AttentionBlock
from pronghorn.blocks.glu import GluBlock, tile_slices
from pronghorn.blocks.head_groups import grouped_attention_backward, groups_of_heads, head_groups, lse_of
from pronghorn.blocks.levels import Level, keeps
from pronghorn.blocks.projection import GradientSink, LinearProjection, ProjectionGroup, rows_are_independent
from pronghorn.kernels.attention import attention_backward
from pronghorn.weights import DenseWeight, FourBitWeight, Weight

if TYPE_CHECKING:
    from pronghorn.blocks.layer import DecoderLayer

#: Bytes of a layer's input (32,768 tokens of an 8B model) from which on rows count as long. Below, heads do not go in
#: groups, and what tiles save is little beside the weights.
LONG_INPUT = 2**28
#: Tiles of at most so many rows are chosen where memory is short. q, k and v are made again by tiles of no fewer rows,
#: since each group of heads goes through all of them.
SCARCE_TILES = 8192


def is_long(input_bytes: int, level: Level) -> bool:
    """Whether a layer that keeps nothing but its input of so many bytes is run as this module does, if it can be."""
    return input_bytes >= LONG_INPUT and not keeps(level, "attention")


def makes_heads_again(tile_rows: int, head_norms: bool) -> bool:
    """Whether q, k and v are made again for each group of heads."""
    return tile_rows <= SCARCE_TILES or head_norms


def tile_rows_of_heads(tile_rows: int) -> int:
    """Most rows of a tile by which q, k and v are made again."""
    return max(tile_rows, SCARCE_TILES)


def leaves_place(groups: int) -> bool:
    """Whether the workspace of one of so many groups of heads, three sums in fp32 at most, is smaller than q."""
    return groups >= 8


def can_split(layer: DecoderLayer, tokens: int) -> bool:
    """Whether rows, and heads in attention's backward, may go apart: nothing else depends on their number, and no
    gradient is rounded to 16 bits at each tile."""
    attention, glu = layer.attention, layer.glu
    if not isinstance(attention, AttentionBlock) or not isinstance(glu, GluBlock):
        return False
    if glu.beside_attention or not glu.adds_down or not glu.rows_are_independent():
        return False
    plain = attention.output_norm is None and attention.output_scale == 1.0
    if not plain or attention.gated or attention.norms_apart or attention.call.sinks is not None:
        return False
    projections = (*attention.qkv.projections, *attention.o.projections)
    return (
        head_groups(tokens, attention.kv_heads, attention.call.backend) > 1
        and len(attention.o.projections) == 1
        and rows_are_independent(projections, attention.trainable())
        and all(isinstance(p, LinearProjection) and _multiplies_plainly(p.weight) for p in projections)
    )


def _multiplies_plainly(weight: Weight) -> bool:
    """Whether the weight is frozen and all products are those of the plain matrix, so that one of some columns is a
    part of the whole one."""
    return type(weight) in (DenseWeight, FourBitWeight) and weight.parameter is None


def forward(layer: DecoderLayer, x: Tensor) -> Tensor:
    """The layer's output [T, H] of x [T, H]."""
    attention, glu = _parts(layer)
    saves: Any = attention.Saves()
    _attend(layer, attention, x, saves)
    saves.q = saves.k = saves.v = saves.lse = None
    out = torch.empty_like(x)
    for at in glu.tiles(x.shape[0]):
        out[at] = glu.forward(layer.dtype, "none", _residual_sum(layer, x, saves, at))
    return out


def backward(
    layer: DecoderLayer, dout: Tensor, x: Tensor, saves: Any, sink: GradientSink, need: bool
) -> Tensor | None:
    """dX [T, H], written over dout [T, H] where the layer owns that; None unless `need`."""
    attention, glu = _parts(layer)
    _attend(layer, attention, x, saves)
    tiles = glu.tiles(x.shape[0])
    saves.xa_o = attention.o.down(saves.out.flatten(1))
    again = makes_heads_again(glu.tile_rows, attention.q_norm is not None)
    if again:
        saves.q = saves.k = saves.v = None
    dsummed = dout if layer.owns_gradients else torch.empty_like(dout)
    for at in tiles:
        # Nothing of a tile has a name here: it would live until the next one's is there.
        dsummed[at] = glu.backward(dout[at], layer.dtype, _residual_sum(layer, x, saves, at), sink).tensor
    if again:
        heads = _heads_again_backward(layer, attention, dsummed, x, saves, sink)
    else:
        heads = _heads_backward(layer, attention, dsummed, saves, sink)
    for at in tiles:
        _input_grad_(layer, dsummed, x, heads, saves.xa_qkv, at, sink, need)
    return dsummed if need else None


def _parts(layer: DecoderLayer) -> tuple[AttentionBlock, GluBlock]:
    attention, glu = layer.attention, layer.glu
    assert isinstance(attention, AttentionBlock) and isinstance(glu, GluBlock)
    return attention, glu


def _attend(layer: DecoderLayer, attention: AttentionBlock, x: Tensor, saves: Any) -> None:
    """q, k, v, the attention's output and statistics, without the norm's output beside the last two."""
    attention.make_heads(x, layer.dtype, saves)
    saves.normed = None
    attention.attend(saves)


def _residual_sum(layer: DecoderLayer, x: Tensor, saves: Any, at: slice) -> Any:
    """The GLU block's saves for some rows, with their residual sum x + o(out) and its norm."""
    attention, glu = _parts(layer)
    of_heads = attention.Saves(out=saves.out[at], xa_o=None if saves.xa_o is None else saves.xa_o[at])
    of_rows = glu.Saves()
    glu.add_residual(x[at], attention.output(of_heads), layer.dtype, of_rows)
    return of_rows


def _heads_backward(
    layer: DecoderLayer, attention: AttentionBlock, dsummed: Tensor, saves: Any, sink: GradientSink
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what the attention saw as q, k and v, written over those; they and its output leave `saves`."""
    columns = _dout(layer, attention, dsummed, saves, sink)
    out = saves.out
    saves.out = None
    q, k, v, lse = saves.q, saves.k, saves.v, saves.lse
    saves.q = saves.k = saves.v = saves.lse = None
    dq, dk, dv = grouped_attention_backward(
        columns, q, k, v, out, lse, attention.docs, attention.call, over=True
    )
    if attention.query_scale is not None:
        dq.mul_(attention.query_scale)
    return dq, dk, dv


def _heads_again_backward(
    layer: DecoderLayer, attention: AttentionBlock, dsummed: Tensor, x: Tensor, saves: Any, sink: GradientSink
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of q, k and v that are made again for each group of heads; dq is written over the attention's output."""
    columns = _dout(layer, attention, dsummed, saves, sink)
    out, lse = saves.out, saves.lse
    saves.out = saves.lse = None
    tokens, kv_heads = x.shape[0], attention.kv_heads
    dk, dv = (out.new_empty(tokens, kv_heads, attention.head_dim) for _ in range(2))
    weights = [
        p.weight.dense(layer.dtype) for p in attention.qkv.projections if isinstance(p, LinearProjection)
    ]
    fits = leaves_place(head_groups(tokens, kv_heads, attention.call.backend))
    for queries, keys in groups_of_heads(tokens, attention.heads, kv_heads, attention.call.backend):
        # Where q was stays free for a workspace that fits there: what the group has of its own goes elsewhere.
        place = torch.empty_like(out) if fits else None
        q, k, v = _heads(layer, _of_heads(attention, weights, queries, keys), x)
        of_group, of_out = columns(queries), out[:, queries].contiguous()
        statistics = lse_of(lse, queries, attention.call.backend).contiguous()
        del place
        dq_dk_dv = attention_backward(of_group, q, k, v, of_out, statistics, attention.docs, attention.call)
        del of_group, of_out, statistics, q, k, v
        out[:, queries], dk[:, keys], dv[:, keys] = dq_dk_dv
        del dq_dk_dv
    if attention.query_scale is not None:
        out.mul_(attention.query_scale)
    return out, dk, dv


def _dout(
    layer: DecoderLayer, attention: AttentionBlock, dsummed: Tensor, saves: Any, sink: GradientSink
) -> Callable[[slice], Tensor]:
    """What makes the gradient [T, heads, D] of some heads of the attention's output; o's other gradients are done."""
    dy = dsummed if dsummed.dtype == layer.dtype else dsummed.to(layer.dtype)
    flat, size = saves.out.flatten(1), attention.head_dim
    columns, grads = attention.o.input_grad_columns(dy, sink, saves.xa_o)
    attention.o.parameter_grads([dy], flat, saves.xa_o, grads, sink)
    saves.xa_o = None

    def of_heads(heads: slice) -> Tensor:
        return columns(slice(heads.start * size, heads.stop * size)).view(dy.shape[0], -1, size)

    return of_heads


def _of_heads(
    attention: AttentionBlock, weights: Sequence[Tensor], queries: slice, keys: slice
) -> AttentionBlock:
    """The block as far as it makes q, k and v of some heads, of its projections' `weights` as they are multiplied."""
    size, group = attention.head_dim, attention.qkv
    rows = [slice(heads.start * size, heads.stop * size) for heads in (queries, keys, keys)]
    owners = [0, 1, 2]
    if group.is_one_matrix:
        first, owners = (0, attention.heads, attention.heads + attention.kv_heads), [0, 0, 0]
        rows = [slice(at.start + n * size, at.stop + n * size) for at, n in zip(rows, first, strict=True)]
    parts = []
    for owner, at in zip(owners, rows, strict=True):
        projection = group.projections[owner]
        assert isinstance(projection, LinearProjection)
        adapters = tuple(
            replace(a, b=a.b.detach()[at], b_bias=None if a.b_bias is None else a.b_bias.detach()[at])
            for a in projection.adapters
        )
        bias = None if projection.bias is None else projection.bias.detach()[at]
        parts.append(LinearProjection(DenseWeight(weights[owner].detach()[at]), bias, adapters))
    return replace(
        attention,
        qkv=ProjectionGroup(parts, impl=group.impl),
        heads=queries.stop - queries.start,
        kv_heads=keys.stop - keys.start,
    )


def _heads(layer: DecoderLayer, part: AttentionBlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as the attention sees them, of all rows of x."""
    shapes = ((x.shape[0], heads, part.head_dim) for heads in (part.heads, part.kv_heads, part.kv_heads))
    q, k, v = (x.new_empty(shape, dtype=layer.dtype) for shape in shapes)
    for at in tile_slices(x.shape[0], tile_rows_of_heads(_parts(layer)[1].tile_rows)):
        q[at], k[at], v[at] = part.of_rows(at).seen_heads(x[at], layer.dtype)
    return q, k, v


def _input_grad_(
    layer: DecoderLayer,
    dsummed: Tensor,
    x: Tensor,
    heads: Sequence[Tensor],
    xa: Tensor | None,
    at: slice,
    sink: GradientSink,
    need: bool,
) -> None:
    """The gradient of some rows of x over that of the residual sum, from those of q, k and v."""
    attention, _ = _parts(layer)
    part, of_rows = attention.of_rows(at), attention.Saves(xa_qkv=None if xa is None else xa[at])
    if attention.q_norm is not None:
        part.make_heads(x[at], layer.dtype, of_rows)
    of_heads = [*(of_head[at] for of_head in heads), None]
    dx = part.through_projections(of_heads, x[at], layer.dtype, of_rows, sink, need, dsummed[at])
    if dx is not None:
        dsummed[at] = dx
