"""The allocations of a layer whose rows are so long that they, and heads, go apart (`blocks.long_rows`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pronghorn.blocks import Level
from pronghorn.blocks.head_groups import head_groups
from pronghorn.blocks.long_rows import is_long
from pronghorn.memory.products import OUT, QKV, Held
from pronghorn.memory.shape import ModelShape

if TYPE_CHECKING:
    from pronghorn.memory.schedule import Step


def splits(shape: ModelShape, tokens: int, level: Level) -> bool:
    """`DecoderLayer._splits`, of what sizes tell."""
    others = shape.latent or shape.delta or shape.mixture or shape.parallel
    apart = shape.output_norms or shape.scaled_branches or shape.qk_norm or shape.gated
    eight_bit = shape.eight_bit_forward or shape.fp8_backward or shape.storage == "bitsandbytes int8"
    if others or apart or eight_bit or shape.trained != "adapters" or not shape.rows_go_apart:
        return False
    size = tokens * shape.hidden * shape.residual_element
    return is_long(size, level) and head_groups(tokens, shape.kv_heads, shape.attention) > 1


def forward(step: Step) -> int:
    """`blocks.long_rows.forward`: the layer's output."""
    saves: Held = {}
    _attend(step, saves)
    step._drop(saves, "q", "k", "v", "lse")
    out = step._new(step._residual())
    for part in _tiles(step):
        of_rows = _residual_sum(part)
        step._free(part._glu_forward("none", of_rows))
    step._drop(saves, "xa_qkv", "out")
    return out


def backward(step: Step, dout: int, need: bool) -> int:
    """`blocks.long_rows.backward`: what it gives is written over dout."""
    shape, saves = step.shape, Held()
    _attend(step, saves)
    step._keep(saves, "xa_o", step.tokens * shape.rank(*OUT) * step.element)
    for part in _tiles(step):
        of_rows = _residual_sum(part)
        dsummed, _ = part._glu_backward(of_rows)
        step._drop(of_rows, *list(of_rows))
        step._free(dsummed)
    _heads_backward(step, saves)
    for part in _tiles(step):
        of_rows = {"xa_qkv": (-1, 0)} if shape.rank(*QKV) else {}
        step._free(part._through_projections(of_rows, [-1, -1, -1], need))
        step._drop(of_rows, *list(of_rows))
    step._drop(saves, "q", "k", "v", "xa_qkv")
    return dout


def _tiles(step: Step) -> Iterator[Step]:
    """The step over the rows of each tile."""
    for at in step._tiles():
        yield step.of_rows(at.stop - at.start)


def _attend(step: Step, saves: Held) -> None:
    step._heads(saves)
    step._drop(saves, "normed_attention")
    step._attention_output(saves)


def _residual_sum(part: Step) -> Held:
    """A tile's residual sum and its norm."""
    of_rows: Held = dict.fromkeys(("q", "out"), (-1, 0))
    part._attend("none", of_rows)
    part._drop(of_rows, "q", "out", "xa_o")
    return of_rows


def _heads_backward(step: Step, saves: Held) -> None:
    """`blocks.long_rows._heads_backward`: q, k and v become their gradients."""
    shape, t, e = step.shape, step.tokens, step.element
    dxa = step._new(t * shape.rank(*OUT) * e)
    if shape.rank(*OUT):
        step._free(*[step._new(size) for size in step._partial_sums(OUT, t, True)])
    unpacked = step._new(shape.linear_parameters(*OUT) * shape.unpacked_backward)
    step._drop(saves, "xa_o")
    groups = head_groups(t, shape.kv_heads, shape.attention)
    for _ in range(groups):
        dout = step._new(t * shape.q // groups * e)
        step._free(*[step._new(size) for size in step._attention_workspace(dout_apart=True)][::-1])
        step._free(dout)
    step._free(dxa, unpacked)
    step._drop(saves, "out", "lse")
