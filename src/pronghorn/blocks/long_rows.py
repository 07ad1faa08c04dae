"""A decoder layer on a stream so long that memory holds only a few tensors of a layer input's size.

The usual order of work has nine of them at once (Llama-3.1-8B: 70 KB a token). Only attention itself needs all rows:

    forward   q, k, v of norm(x); out = attention(q, k, v); then by tiles of rows y = x + o(out), y + glu(norm(y))
    backward  q, k, v, out again; by tiles y again and dy, which is written over the gradient of the layer's output;
              by groups of heads the columns of dout = dy W_o, attention's backward, dq, dk, dv over q, k, v;
              by tiles the input gradient of q, k, v and the norm's, over dy

so that besides x and the gradient there are q, k, v, out, and one tile or one group of heads (49 KB). The products are
the same ones, each made as often as before; adapters' gradients are summed over tiles in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pronghorn.blocks.attention import AttentionBlock
from pronghorn.blocks.glu import GluBlock
from pronghorn.blocks.head_groups import grouped_attention_backward, head_groups
from pronghorn.blocks.levels import Level, keeps
from pronghorn.blocks.projection import GradientSink, LinearProjection
from pronghorn.weights import DenseWeight, FourBitWeight, Weight

if TYPE_CHECKING:
    from pronghorn.blocks.layer import DecoderLayer

#: Bytes of a layer's input (32,768 tokens of an 8B model) from which on rows count as long. Below, heads do not go in
#: groups, and what tiles save is little beside the weights.
LONG_INPUT = 2**28


def is_long(input_bytes: int, level: Level) -> bool:
    """Whether a layer that keeps nothing but its input of so many bytes is run as this module does, if it can be."""
    return input_bytes >= LONG_INPUT and not keeps(level, "attention")


def can_split(layer: DecoderLayer, tokens: int) -> bool:
    """Whether rows, and heads in attention's backward, may go apart: nothing else depends on their number, and no
    gradient is rounded to 16 bits at each tile."""
    attention, glu = layer.attention, layer.glu
    if not isinstance(attention, AttentionBlock) or not isinstance(glu, GluBlock):
        return False
    if glu.beside_attention or not glu.adds_down or not glu.rows_are_independent():
        return False
    plain = attention.q_norm is None and attention.k_norm is None and not attention.gated
    plain = plain and attention.output_norm is None and attention.output_scale == 1.0
    if not plain or attention.call.sinks is not None:
        return False
    projections = (*attention.qkv.projections, *attention.o.projections)
    return (
        head_groups(tokens, attention.kv_heads, attention.call.backend) > 1
        and len(attention.o.projections) == 1
        and all(isinstance(p, LinearProjection) and _multiplies_plainly(p.weight) for p in projections)
        and not any(a.dropout for p in projections if isinstance(p, LinearProjection) for a in p.adapters)
        and all(t.dtype in (torch.float32, torch.float64) for t in attention.trainable())
        and not any(isinstance(p, LinearProjection) and p.weight.parameter is not None for p in projections)
    )


def _multiplies_plainly(weight: Weight) -> bool:
    """Whether all products are those of the plain matrix, so that one of some columns is a part of the whole one."""
    return type(weight) in (DenseWeight, FourBitWeight)


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
    dsummed = dout if layer.owns_gradients else torch.empty_like(dout)
    for at in tiles:
        # Nothing of a tile has a name here: it would live until the next one's is there.
        dsummed[at] = glu.backward(dout[at], layer.dtype, _residual_sum(layer, x, saves, at), sink).tensor
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
    dy = dsummed if dsummed.dtype == layer.dtype else dsummed.to(layer.dtype)
    out, flat = saves.out, saves.out.flatten(1)
    columns, grads = attention.o.input_grad_columns(dy, sink, saves.xa_o)
    attention.o.parameter_grads([dy], flat, saves.xa_o, grads, sink)
    saves.out = saves.xa_o = None
    del flat
    q, k, v, lse = saves.q, saves.k, saves.v, saves.lse
    saves.q = saves.k = saves.v = saves.lse = None
    dq, dk, dv = grouped_attention_backward(
        _of_heads(columns, attention.head_dim), q, k, v, out, lse, attention.docs, attention.call, over=True
    )
    if attention.query_scale is not None:
        dq.mul_(attention.query_scale)
    return dq, dk, dv


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
    of_rows = attention.Saves(xa_qkv=None if xa is None else xa[at])
    of_heads = [*(of_head[at] for of_head in heads), None]
    dx = attention.of_rows(at).through_projections(
        of_heads, x[at], layer.dtype, of_rows, sink, need, dsummed[at]
    )
    if dx is not None:
        dsummed[at] = dx


def _of_heads(columns: Callable[[slice], Tensor], size: int) -> Callable[[slice], Tensor]:
    """What makes a gradient [T, heads, D] of some heads, from what makes columns of the whole one [T, N·D]."""

    def make(heads: slice) -> Tensor:
        found = columns(slice(heads.start * size, heads.stop * size))
        return found.view(found.shape[0], -1, size)

    return make
