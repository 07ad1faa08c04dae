"""Four products of one row in one launch on Hopper, written in Gluon (Triton's language of explicit layouts and warps).

One program a processor, all of them at work at the same time. One of its warps copies weights, of all four products
one after another, into a ring of tiles, and waits for nothing but room in it; the others multiply, and wait for all
programs between products. So memory has the next product's weights to bring while its input is still being made.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pronghorn.kernels.triton.gluon_parts import activated, launch_next, view, wait_for_last
from pronghorn.kernels.triton.launch import dependent_launch, processors
from pronghorn.kernels.triton.walk_parts import (
    CHUNK,
    HALVES,
    LINE,
    LINES,
    MOST_HANDED,
    MOST_KEPT,
    ROUND,
    ROWS,
    WARPS,
    adapter_share,
    copy_all,
    first_of_adapter,
    halves_of,
    hand_on,
    inverse_rms,
    loaded_tiles,
    look_ahead,
    meet,
    next_rows,
    norm_weight,
    put_row,
    put_scaled,
    receive,
    widened,
)
from pronghorn.kernels.walk import Adapters, Meeting, Walk

#: with fewer slots of the ring nothing is gained
LEAST_SLOTS = 5
#: of its own shared memory a processor keeps this much for the attention kernel, which begins beside a walk's end
_LEFT_FREE = 36 * 1024
#: of each of its threads at most, so that the attention kernel finds room beside it
_REGISTERS = 112
#: how often a program looks whether all others have come, before it goes on without them (about a second)
PATIENCE = 1 << 20
#: numbers of a row that an adapter's B may have, so that programs keep them in registers
MOST_RANK = 32


@gluon.jit
def _multiply(
    xs, squares, eps, bias_ptr, residual_ptr, out_ptr, b_ptr, adapter, handed_ptr, turn, lost_ptr, patience, handed,
    rounds, ring, full, empty, slot, phase, outs: gl.constexpr,
    width: gl.constexpr, NORM: gl.constexpr, KIND: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
    RANKS: gl.constexpr, ENDS: gl.constexpr, SLOTS: gl.constexpr, UNITS: gl.constexpr,
):  # fmt: skip
    """A program's outputs of one weight, a round of them at a time; before them its rows of an adapter's A."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4, 8], [ROWS, WARPS // ROWS, 1], [2, 1, 0])
    of_x: gl.constexpr = gl.SliceLayout(0, layout)
    # Of an output two halves, of gate and up both in turn.
    PARTS: gl.constexpr = 2 if KIND == "" else 4
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    of_parts: gl.constexpr = gl.BlockedLayout([1, PARTS], [32, 1], [WARPS, 1], [1, 0])
    of_outs: gl.constexpr = gl.SliceLayout(1, of_parts)
    # Of q, k and v, or of gate and up, each has a part of its own in what is handed on.
    ADAPTERS: gl.constexpr = len(ENDS)
    RANK: gl.constexpr = RANKS // ADAPTERS
    ROOM: gl.constexpr = 16 if RANKS <= 16 else 32 if RANKS <= 32 else 64 if RANKS <= 64 else MOST_HANDED
    parts = view(rounds, gl.float32, [ROUND, ROWS, PARTS], flat)
    bundles: gl.constexpr = (width + UNITS * LINES * LINE - 1) // (UNITS * LINES * LINE)
    # A short row of the input stays in registers.
    KEPT: gl.constexpr = bundles * UNITS <= MOST_KEPT
    kept = widened(loaded_tiles(xs, 0, of_x, bundles * UNITS if KEPT else 1), bundles * UNITS if KEPT else 1)
    programs = gl.num_programs(0)
    if RANKS > 0:
        for group in range(first_of_adapter(), RANKS // ROWS, programs):
            sums, _, slot, phase = next_rows(
                xs, kept, ring, full, empty, slot, phase, bundles, KEPT, False, SLOTS, UNITS
            )
            hand_on(sums, handed_ptr, group, turn)
        seen = look_ahead(handed_ptr, RANKS, ROOM)
    rstd = eps
    groups = (outs // ROWS - gl.program_id(0) + programs - 1) // programs
    for begin in range(0, groups, ROUND):
        many = gl.minimum(groups - begin, ROUND)
        i = gl.arange(0, ROUND * ROWS, of_outs)
        row = (gl.program_id(0) + (begin + i // ROWS) * programs) * ROWS + i % ROWS
        known = i < many * ROWS
        # What is added in the end is on its way while weights are multiplied.
        if RESIDUAL:
            rest = gl.load(residual_ptr + row, mask=known, other=0.0, cache_modifier=".cg").to(gl.float32)
        if BIAS:
            bias = gl.load(bias_ptr + row, mask=known, other=0.0).to(gl.float32)
            if KIND != "":
                up_bias = gl.load(bias_ptr + outs + row, mask=known, other=0.0).to(gl.float32)
        if RANKS > 0:
            of_b: gl.constexpr = gl.BlockedLayout([1, RANK], [32, 1], [WARPS, 1], [1, 0])
            j = gl.arange(0, ROUND * ROWS, gl.SliceLayout(1, of_b))
            of_j = (gl.program_id(0) + (begin + j // ROWS) * programs) * ROWS + j % ROWS
            # `ENDS` has the number of B's rows last.
            b_at = b_ptr + adapter * (ENDS[ADAPTERS - 1] * RANK) + gl.expand_dims(of_j * RANK, 1)
            b_at = b_at + gl.expand_dims(gl.arange(0, RANK, gl.SliceLayout(0, of_b)), 0)
            there = gl.expand_dims(j < many * ROWS, 1)
            b = gl.load(b_at, mask=there, other=0.0)
            if KIND != "":
                up_b = gl.load(b_at + outs * RANK, mask=there, other=0.0)
        for group in range(many):
            if RANKS > 0:  # noqa: SIM102 - known when this is compiled, and the other is not
                if group == many - 1:
                    seen = look_ahead(handed_ptr, RANKS, ROOM)
            sums, others, slot, phase = next_rows(
                xs, kept, ring, full, empty, slot, phase, bundles, KEPT, KIND != "", SLOTS, UNITS
            )
            halves = halves_of(sums)
            if KIND != "":
                halves = gl.reshape(gl.join(halves, halves_of(others)), [ROWS, 4])
            parts.index(group).store(halves)
        if NORM:  # noqa: SIM102
            # Not before: the sums of squares have gone from warp to warp while these multiplied.
            if begin == 0:
                rstd = inverse_rms(squares, eps, width)
        if RANKS > 0:
            receive(seen, handed_ptr, turn, lost_ptr, patience, handed, RANKS, ROOM)
        found = view(parts, gl.float32, [ROUND * ROWS, PARTS], flat).load(of_parts)
        if KIND != "":
            y, up = gl.split(gl.sum(gl.reshape(found, [ROUND * ROWS, 2, 2]), 1))
            y, up = gl.convert_layout(y, of_outs), gl.convert_layout(up, of_outs)
            if RANKS > 0:
                y += adapter_share(b, handed, 0, RANK, of_outs)
                up += adapter_share(up_b, handed, 1, RANK, of_outs)
            y, up = y * rstd, up * rstd
            if BIAS:
                y += bias
                up += up_bias
            y = activated(y, up, KIND)
        else:
            y = gl.sum(found, 1)
            if RANKS > 0:
                share = adapter_share(b, handed, 0, RANK, of_outs)
                for part in gl.static_range(1, ADAPTERS):
                    share = gl.where(
                        row < ENDS[part - 1], share, adapter_share(b, handed, part, RANK, of_outs)
                    )
                y += share
            if NORM:
                y *= rstd
            if BIAS:
                y += bias
        if RESIDUAL:
            y += rest
        gl.store(out_ptr + row, y.to(out_ptr.dtype.element_ty), mask=known)
    return slot, phase


@gluon.jit
def _walk(
    attended_ptr, x_ptr, act_ptr, out_ptr, norms, biases, b_ptrs, slots_ptr, handed_ptr, met_ptr, lost_ptr,
    ring, full, empty, wide, narrow, rounds, handed, mlp_eps, mlp_offset, last_eps, last_offset, patience,
    ATTENDED: gl.constexpr, HIDDEN: gl.constexpr, INNER: gl.constexpr, OUTS: gl.constexpr, KIND: gl.constexpr,
    BIASES: gl.constexpr, RANKS: gl.constexpr, ENDS: gl.constexpr, SLOTS: gl.constexpr, UNITS: gl.constexpr,
    CHUNKS_ATTENDED: gl.constexpr, CHUNKS_HIDDEN: gl.constexpr, CHUNKS_INNER: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The multiplying warps."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    tile: gl.constexpr = LINES * LINE
    scaled = view(wide, gl.float32, [CHUNKS_HIDDEN * CHUNK // tile, LINES, LINE], flat)
    plain = view(narrow, narrow.dtype, [narrow.shape[0] * CHUNK // tile, LINES, LINE], flat)
    slot = 0
    phase = 0
    if PDL:
        launch_next()
        wait_for_last()
    programs = gl.num_programs(0).to(gl.int64)
    # A launch adds three times the programs, of which some may have come to the first meeting.
    begun = gl.load(met_ptr, volatile=True)
    target = begun - begun % programs + programs
    turn = target.to(gl.int32)
    adapter = gl.load(slots_ptr)
    # After a walk that was lost nobody waits any more: what follows is thrown away with it.
    patience = gl.where(gl.load(lost_ptr, volatile=True) > 0, 1, patience)
    put_row(attended_ptr, narrow, ATTENDED, CHUNKS_ATTENDED)
    slot, phase = _multiply(
        plain, 0.0, 1.0, biases[0], x_ptr, x_ptr, b_ptrs[0], adapter, handed_ptr, turn, lost_ptr, patience, handed,
        rounds, ring, full, empty, slot, phase, HIDDEN, ATTENDED, False, "", BIASES[0], True, RANKS[0], (HIDDEN,),
        SLOTS, UNITS,
    )  # fmt: skip
    weight = norm_weight(norms[0], mlp_offset, HIDDEN, CHUNKS_HIDDEN)
    meet(met_ptr, lost_ptr, target, patience)
    squares = put_scaled(x_ptr, weight, wide, HIDDEN, CHUNKS_HIDDEN)
    slot, phase = _multiply(
        scaled, squares, mlp_eps, biases[1], x_ptr, act_ptr, b_ptrs[1], adapter, handed_ptr + HALVES, turn, lost_ptr,
        patience, handed, rounds, ring, full, empty, slot, phase, INNER, HIDDEN, True, KIND, BIASES[1], False, RANKS[1],
        (INNER, 2 * INNER), SLOTS, UNITS,
    )  # fmt: skip
    meet(met_ptr, lost_ptr, target + programs, patience)
    put_row(act_ptr, narrow, INNER, CHUNKS_INNER)
    slot, phase = _multiply(
        plain, 0.0, 1.0, biases[2], x_ptr, x_ptr, b_ptrs[2], adapter, handed_ptr + 2 * HALVES, turn, lost_ptr,
        patience, handed, rounds, ring, full, empty, slot, phase, HIDDEN, INNER, False, "", BIASES[2], True, RANKS[2],
        (HIDDEN,), SLOTS, UNITS,
    )  # fmt: skip
    weight = norm_weight(norms[1], last_offset, HIDDEN, CHUNKS_HIDDEN)
    meet(met_ptr, lost_ptr, target + 2 * programs, patience)
    squares = put_scaled(x_ptr, weight, wide, HIDDEN, CHUNKS_HIDDEN)
    slot, phase = _multiply(
        scaled, squares, last_eps, biases[3], x_ptr, out_ptr, b_ptrs[3], adapter, handed_ptr + 3 * HALVES, turn,
        lost_ptr, patience, handed, rounds, ring, full, empty, slot, phase, OUTS, HIDDEN, True, "", BIASES[3], False,
        RANKS[3], ENDS, SLOTS, UNITS,
    )  # fmt: skip


@gluon.jit
def _four_products(
    o_desc, gate_up_desc, down_desc, last_desc, o_a_desc, gate_up_a_desc, down_a_desc, last_a_desc,
    attended_ptr, x_ptr, act_ptr, out_ptr, norms, biases, b_ptrs, slots_ptr, handed_ptr, met_ptr, lost_ptr,
    mlp_eps, mlp_offset, last_eps, last_offset, patience,
    ATTENDED: gl.constexpr, HIDDEN: gl.constexpr, INNER: gl.constexpr, OUTS: gl.constexpr, KIND: gl.constexpr,
    BIASES: gl.constexpr, RANKS: gl.constexpr, ENDS: gl.constexpr, SLOTS: gl.constexpr, UNITS: gl.constexpr,
    CHUNKS_ATTENDED: gl.constexpr, CHUNKS_HIDDEN: gl.constexpr, CHUNKS_INNER: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    # One by one they come in, since the launcher of Triton 3.6 finds none in a tuple.
    descs = (o_desc, gate_up_desc, down_desc, last_desc)
    a_descs = (o_a_desc, gate_up_a_desc, down_a_desc, last_a_desc)
    most: gl.constexpr = CHUNKS_INNER if CHUNKS_INNER > CHUNKS_ATTENDED else CHUNKS_ATTENDED
    ring = gl.allocate_shared_memory(o_desc.dtype, [SLOTS * UNITS, ROWS, LINES, LINE], o_desc.layout)
    wide = gl.allocate_shared_memory(gl.float32, [CHUNKS_HIDDEN, CHUNK], flat)
    narrow = gl.allocate_shared_memory(o_desc.dtype, [most, CHUNK], flat)
    rounds = gl.allocate_shared_memory(gl.float32, [ROUND * ROWS, 4], flat)
    handed = gl.allocate_shared_memory(gl.float32, [MOST_HANDED], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    gl.warp_specialize(
        [
            (_walk, (attended_ptr, x_ptr, act_ptr, out_ptr, norms, biases, b_ptrs, slots_ptr, handed_ptr, met_ptr,
                     lost_ptr, ring, full, empty, wide, narrow, rounds, handed, mlp_eps, mlp_offset, last_eps,
                     last_offset, patience, ATTENDED, HIDDEN, INNER, OUTS, KIND, BIASES, RANKS, ENDS, SLOTS, UNITS,
                     CHUNKS_ATTENDED, CHUNKS_HIDDEN, CHUNKS_INNER, PDL)),
            (copy_all, (descs, a_descs, slots_ptr, ring, full, empty, ATTENDED, HIDDEN, INNER, OUTS, RANKS, SLOTS,
                     UNITS)),
        ],
        [1],
        [40],
    )  # fmt: skip


class Tiling(NamedTuple):
    """`units` tiles of four rows a slot of the ring."""

    units: int
    slots: int

    @property
    def columns(self) -> int:
        return self.units * LINES.value * LINE.value

    def padded(self, width: int) -> int:
        """Columns of the slots that a row takes."""
        return triton.cdiv(width, self.columns) * self.columns

    def chunks(self, width: int) -> int:
        """Chunks of 2,048 numbers, a power of two, in which all tiles of a row lie."""
        return triton.next_power_of_2(triton.cdiv(self.padded(width), CHUNK.value))


@cache
def tiling_for(attended: int, hidden: int, inner: int, room: int) -> Tiling:
    """Slots of 16 KB, or of 12 where rows are multiples of 1,536 numbers, as many as `room` bytes hold."""
    one = Tiling(3 if hidden % 1536 == 0 and hidden % 2048 else 4, 1)
    inputs = 4 * one.chunks(hidden) + 2 * max(one.chunks(attended), one.chunks(inner))
    slots = (room - inputs * CHUNK.value - 4096 - 4 * MOST_HANDED.value) // (2 * ROWS.value * one.columns)
    return one._replace(slots=slots)


@cache
def _room(index: int) -> int:
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin - _LEFT_FREE


def _tiling(steps: Walk) -> Tiling:
    o, _, down, _ = steps[:4]
    return tiling_for(
        o.weight.shape[1], o.weight.shape[0], down.weight.shape[1], _room(o.weight.device.index)
    )


def fits(steps: Walk) -> bool:
    """Whether weights in bf16 lie as the copy engine takes them, and fill what they take of a ring that is not short.

    Rows of 1,536 or 4,096 numbers fill it; measured on an H200.
    """
    weights = [step.weight for step in steps[:4]]
    aligned = all(
        weight.dtype == torch.bfloat16
        and weight.is_contiguous()
        and weight.shape[0] % (2 * ROWS.value) == 0
        and weight.shape[1] % LINE.value == 0
        and weight.data_ptr() % 16 == 0
        for weight in weights
    )
    if not aligned or not all(step.adapter is None or _takes(step.adapter) for step in steps[:4]):
        return False
    tiling = _tiling(steps)
    filled = all(4 * weight.shape[1] >= 3 * tiling.padded(weight.shape[1]) for weight in weights)
    return filled and tiling.slots >= LEAST_SLOTS


def _takes(adapter: Adapters) -> bool:
    a, b = adapter.a, adapter.b
    same = a.dtype == b.dtype == torch.bfloat16 and a.is_contiguous() and b.is_contiguous()
    return same and b.shape[2] <= MOST_RANK and a.shape[1] <= MOST_HANDED.value


def _lines(weight: Tensor) -> Any:
    layout = gl.NVMMASharedLayout(128, 16, 3)
    by_line = weight.view(weight.shape[0], -1, LINE.value)
    return TensorDescriptor.from_tensor(by_line, [ROWS.value, LINES.value, LINE.value], layout)


def walk(
    attended: Tensor, x: Tensor, steps: Walk, meeting: Meeting, slots: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    device, products = x.device, steps[:4]
    _, gate_up, down, last = products
    assert gate_up.norm is not None and last.norm is not None
    sizes = attended.shape[1], x.shape[1], down.weight.shape[1]
    act = torch.empty(1, sizes[2], dtype=x.dtype, device=device)
    out = torch.empty(1, last.weight.shape[0], dtype=out_dtype, device=device)
    tiling, pdl = _tiling(steps), dependent_launch(device)
    descs = [_lines(p.weight) for p in products]
    tables = [p.adapter for p in products]
    a_descs = [d if t is None else _lines(t.a.flatten(0, 1)) for t, d in zip(tables, descs, strict=True)]
    _four_products[(processors(device.index or 0),)](
        *descs, *a_descs,
        attended, x, act, out, (gate_up.norm.weight, last.norm.weight),
        tuple(x if p.bias is None else p.bias for p in products), tuple(x if t is None else t.b for t in tables),
        meeting.came if slots is None else slots, meeting.handed, meeting.came, meeting.lost,
        gate_up.norm.eps, gate_up.norm.offset, last.norm.eps, last.norm.offset, PATIENCE,
        *sizes, last.weight.shape[0], steps.activation, tuple(p.bias is not None for p in products),
        RANKS=tuple(0 if t is None else t.a.shape[1] for t in tables),
        ENDS=(last.weight.shape[0],) if last.adapter is None else last.adapter.ends,
        SLOTS=tiling.slots, UNITS=tiling.units,
        CHUNKS_ATTENDED=tiling.chunks(sizes[0]), CHUNKS_HIDDEN=tiling.chunks(sizes[1]),
        CHUNKS_INNER=tiling.chunks(sizes[2]), PDL=bool(pdl), num_warps=WARPS.value, maxnreg=_REGISTERS, **pdl,
    )  # fmt: skip
    return out
