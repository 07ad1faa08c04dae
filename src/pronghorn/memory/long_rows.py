"""The allocations of a layer whose rows are so long that they, and heads, go apart (`blocks.long_rows`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from pronghorn.blocks import Level
from pronghorn.blocks.head_groups import head_groups
from pronghorn.blocks.long_rows import is_long, leaves_place, makes_heads_again, tile_rows_of_heads
from pronghorn.memory.products import OUT, QKV, Held
from pronghorn.memory.shape import ModelShape

if TYPE_CHECKING:
    from pronghorn.memory.schedule import Step


def splits(shape: ModelShape, tokens: int, level: Level) -> bool:
    """`DecoderLayer._splits`, of what sizes tell."""
    others = shape.latent or shape.delta or shape.mixture or shape.parallel
    apart = shape.output_norms or shape.scaled_branches or shape.norms_of_all_heads or shape.gated
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
    again = makes_heads_again(step.tile_rows, shape.qk_norm)
    if again:
        step._drop(saves, "q", "k", "v")
    for part in _tiles(step):
        of_rows = _residual_sum(part)
        dsummed, _ = part._glu_backward(of_rows)
        step._drop(of_rows, *list(of_rows))
        step._free(dsummed)
    gradients = (_heads_again_backward if again else _heads_backward)(step, saves)
    for part in _tiles(step):
        of_rows = {"xa_qkv": (-1, 0)} if shape.rank(*QKV) else {}
        if shape.qk_norm:
            of_rows = {}
            part._heads(of_rows)
        fresh = [part.tokens * width * step.element for width in (shape.q, shape.kv) if shape.qk_norm]
        of_heads = [*map(step._new, fresh), *[-1] * (3 - len(fresh))]
        step._free(part._through_projections(of_rows, of_heads, need))
        step._drop(of_rows, *list(of_rows))
    step._free(*gradients)
    step._drop(saves, "q", "k", "v", "xa_qkv", "out")
    return dout


def _tiles(step: Step, tile_rows: int | None = None) -> Iterator[Step]:
    """The step over the rows of each tile."""
    for at in step._tiles(tile_rows):
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


def _heads_backward(step: Step, saves: Held) -> list[int]:
    """`blocks.long_rows._heads_backward`: q, k and v become their gradients."""
    shape, t = step.shape, step.tokens
    held = _dout(step, saves)
    groups = head_groups(t, shape.kv_heads, shape.attention)
    for _ in range(groups):
        dout = step._new(t * shape.q // groups * step.element)
        step._free(*[step._new(size) for size in step._attention_workspace("dout")][::-1])
        step._free(dout)
    step._free(*held)
    step._drop(saves, "out", "lse")
    return []


def _heads_again_backward(step: Step, saves: Held) -> list[int]:
    """`blocks.long_rows._heads_again_backward`: dk and dv; the attention's output becomes dq."""
    shape, t, e = step.shape, step.tokens, step.element
    held = _dout(step, saves)
    gradients = [step._new(t * shape.kv * e) for _ in range(2)]
    modules = [names for names in shape.modules if names[0] in QKV]
    held += [step._new(shape.linear_parameters(*names) * shape.unpacked_forward) for names in modules]
    groups = head_groups(t, shape.kv_heads, shape.attention)
    of_group = _shape_of_heads(shape, groups)
    for _ in range(groups):
        place = step._new(t * shape.q * e if leaves_place(groups) else 0)
        made = [step._new(t * width * e) for width in (of_group.q, of_group.kv, of_group.kv)]
        for part in _tiles(step, tile_rows_of_heads(step.tile_rows)):
            part.shape = of_group
            _seen_heads(part)
        copies = [step._new(t * of_group.q * e) for _ in range(2)]
        copies += [step._new(4 * t * of_group.heads)] if shape.attention == "cudnn" else []
        step._free(place)
        step._free(*[step._new(size) for size in step._attention_workspace("all")][::-1])
        step._free(*copies, *made)
    step._free(*held)
    step._drop(saves, "lse")
    return gradients


def _dout(step: Step, saves: Held) -> list[int]:
    """What is held while columns of dout are made."""
    shape, t = step.shape, step.tokens
    dxa = step._new(t * shape.rank(*OUT) * step.element)
    if shape.rank(*OUT):
        step._free(*[step._new(size) for size in step._partial_sums(OUT, t, True)])
    unpacked = step._new(shape.linear_parameters(*OUT) * shape.unpacked_backward)
    step._drop(saves, "xa_o")
    return [dxa, unpacked]


def _seen_heads(part: Step) -> None:
    """`AttentionBlock.seen_heads`."""
    made: Held = {}
    part._heads(made)
    part._drop(made, "normed_attention", "xa_qkv")
    widths = (part.shape.q, part.shape.kv) if part.shape.qk_norm else ()
    part._free(*[part._new(part.tokens * width * part.element) for width in widths])
    part._drop(made, *list(made))


def _shape_of_heads(shape: ModelShape, groups: int) -> ModelShape:
    """The sizes with which one group of heads is made: of plain weights, each projection by itself."""
    ranks = {**shape.ranks, **(dict.fromkeys(QKV, shape.rank("q")) if shape.fused else {})}
    return replace(
        shape,
        heads=shape.heads // groups,
        kv_heads=shape.kv_heads // groups,
        storage=shape.dtype,
        joined=False,
        fused=False,
        ranks=ranks,
    )
