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

from pronghorn.kernels.triton.gluon_parts import activated, barrier, launch_next, view, wait_for_last
from pronghorn.kernels.triton.launch import dependent_launch, processors
from pronghorn.kernels.triton.walk_adapters import (
    MOST_HANDED,
    phase_of,
    rounds_of,
    see_to_adapters,
)
from pronghorn.kernels.triton.walk_parts import (
    CHUNK,
    LINE,
    LINES,
    MOST_KEPT,
    ROUND,
    ROWS,
    WARPS,
    copy_all,
    halves_of,
    inverse_rms,
    loaded_tiles,
    meet,
    next_rows,
    norm_weight,
    put_row,
    put_scaled,
    widened,
)
from pronghorn.kernels.walk import Adapters, Meeting, Walk

#: with fewer slots of the ring nothing is gained
LEAST_SLOTS = 5
#: of its own shared memory a processor keeps this much for the attention kernel, which begins beside a walk's end
_LEFT_FREE = 36 * 1024
#: shared memory besides the ring and the rows, less than so much
_BESIDE = 7 * 1024
#: of each of its threads at most, so that the attention kernel finds room beside it
_REGISTERS = 112
#: how often a program looks whether all others have come, before it goes on without them (about a second)
PATIENCE = 1 << 20
#: numbers of a row that an adapter's B may have, so that programs keep them in registers
MOST_RANK = 32
#: rounds that products with adapters may have
MOST_ROUNDS = 2


@gluon.jit
def _multiply(
    xs, squares, eps, bias_ptr, residual_ptr, out_ptr, firsts, own, added, made, ready, rounds, ring, full, empty, slot,
    phase, read, read_too, PRODUCT: gl.constexpr, outs: gl.constexpr, width: gl.constexpr, NORM: gl.constexpr,
    KIND: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr, RANKS: gl.constexpr, PROGRAMS: gl.constexpr,
    SLOTS: gl.constexpr, UNITS: gl.constexpr,
):  # fmt: skip
    """A program's outputs of one weight, a round of them at a time; before the first ones all of A x."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4, 8], [ROWS, WARPS // ROWS, 1], [2, 1, 0])
    of_x: gl.constexpr = gl.SliceLayout(0, layout)
    # Of an output two halves, of gate and up both in turn.
    PARTS: gl.constexpr = 2 if KIND == "" else 4
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    of_parts: gl.constexpr = gl.BlockedLayout([1, PARTS], [32, 1], [WARPS, 1], [1, 0])
    of_outs: gl.constexpr = gl.SliceLayout(1, of_parts)
    parts = view(rounds, gl.float32, [ROUND, ROWS, PARTS], flat)
    bundles: gl.constexpr = (width + UNITS * LINES * LINE - 1) // (UNITS * LINES * LINE)
    # A short row of the input stays in registers.
    KEPT: gl.constexpr = bundles * UNITS <= MOST_KEPT
    kept = widened(loaded_tiles(xs, 0, of_x, bundles * UNITS if KEPT else 1), bundles * UNITS if KEPT else 1)
    ADAPTED: gl.constexpr = RANKS[PRODUCT] > 0
    FOLLOWED: gl.constexpr = RANKS[PRODUCT + 1] > 0 if PRODUCT < 3 else False
    if ADAPTED and PRODUCT == 0:
        for group in range(RANKS[0] // ROWS):
            sums, _, slot, phase, read, read_too = next_rows(
                xs, kept, ring, full, empty, slot, phase, read, read_too, bundles, KEPT, False, SLOTS, UNITS
            )
            view(firsts, gl.float32, [MOST_HANDED // ROWS, ROWS, 2], flat).index(group).store(halves_of(sums))
        barrier()
        mbarrier.arrive(made, count=1)
    rstd = eps
    groups = (outs // ROWS - gl.program_id(0) + PROGRAMS - 1) // PROGRAMS
    for begin in range(0, groups, ROUND):
        many = gl.minimum(groups - begin, ROUND)
        i = gl.arange(0, ROUND * ROWS, of_outs)
        row = (gl.program_id(0) + (begin + i // ROWS) * PROGRAMS) * ROWS + i % ROWS
        known = i < many * ROWS
        # What is added in the end is on its way while weights are multiplied.
        if RESIDUAL:
            rest = gl.load(residual_ptr + row, mask=known, other=0.0, cache_modifier=".cg").to(gl.float32)
        if BIAS:
            bias = gl.load(bias_ptr + row, mask=known, other=0.0).to(gl.float32)
            if KIND != "":
                up_bias = gl.load(bias_ptr + outs + row, mask=known, other=0.0).to(gl.float32)
        for group in range(many):
            sums, others, slot, phase, read, read_too = next_rows(
                xs, kept, ring, full, empty, slot, phase, read, read_too, bundles, KEPT, KIND != "", SLOTS, UNITS
            )  # fmt: skip
            halves = halves_of(sums)
            if KIND != "":
                halves = gl.reshape(gl.join(halves, halves_of(others)), [ROWS, 4])
            parts.index(group).store(halves)
        if NORM:  # noqa: SIM102 - known when this is compiled, and the other is not
            # Not before: the sums of squares have gone from warp to warp while these multiplied.
            if begin == 0:
                rstd = inverse_rms(squares, eps, width)
        if ADAPTED:  # noqa: SIM102
            if begin == 0:
                mbarrier.wait(ready, phase_of(RANKS, PRODUCT))
        found = view(parts, gl.float32, [ROUND * ROWS, PARTS], flat).load(of_parts)
        if KIND != "":
            y, up = gl.split(gl.sum(gl.reshape(found, [ROUND * ROWS, 2, 2]), 1))
            y, up = gl.convert_layout(y, of_outs), gl.convert_layout(up, of_outs)
            if ADAPTED:
                y += added.index(begin // ROUND * 2).load(of_outs)
                up += added.index(begin // ROUND * 2 + 1).load(of_outs)
            y, up = y * rstd, up * rstd
            if BIAS:
                y += bias
                up += up_bias
            y = activated(y, up, KIND)
        else:
            y = gl.sum(found, 1)
            if ADAPTED:
                y += added.index(begin // ROUND * 2).load(of_outs)
            if NORM:
                y *= rstd
            if BIAS:
                y += bias
        if RESIDUAL:
            y += rest
        rounded = y.to(out_ptr.dtype.element_ty)
        gl.store(out_ptr + row, rounded, mask=known)
        if FOLLOWED:
            # What others will read, which is rounded.
            own.index(begin // ROUND).store(gl.where(known, rounded.to(gl.float32), 0.0))
    if ADAPTED:  # noqa: SIM102
        if groups <= 0:  # a barrier may not run two uses ahead of who waits for it
            mbarrier.wait(ready, phase_of(RANKS, PRODUCT))
    if FOLLOWED:
        barrier()
        mbarrier.arrive(made, count=1)
    return slot, phase, read, read_too


@gluon.jit
def _walk(
    attended_ptr, x_ptr, act_ptr, out_ptr, norms, biases, met_ptr, lost_ptr, ring, full, empty, wide, narrow, rounds,
    firsts, own, added, made, ready, mlp_eps, mlp_offset, last_eps, last_offset, patience, ATTENDED: gl.constexpr,
    HIDDEN: gl.constexpr, INNER: gl.constexpr, OUTS: gl.constexpr, KIND: gl.constexpr, BIASES: gl.constexpr,
    RANKS: gl.constexpr, PROGRAMS: gl.constexpr, SLOTS: gl.constexpr, UNITS: gl.constexpr,
    CHUNKS_ATTENDED: gl.constexpr, CHUNKS_HIDDEN: gl.constexpr, CHUNKS_INNER: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The multiplying warps."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    tile: gl.constexpr = LINES * LINE
    scaled = view(wide, gl.float32, [CHUNKS_HIDDEN * CHUNK // tile, LINES, LINE], flat)
    plain = view(narrow, narrow.dtype, [narrow.shape[0] * CHUNK // tile, LINES, LINE], flat)
    slot = 0
    phase = 0
    # Slots that all have read, and that are not yet given back; negative for none.
    read = -1
    read_too = -1
    if PDL:
        launch_next()
        wait_for_last()
    programs = gl.num_programs(0).to(gl.int64)
    # A launch adds three times the programs, of which some may have come to the first meeting.
    begun = gl.load(met_ptr, volatile=True)
    target = begun - begun % programs + programs
    # After a walk that was lost nobody waits any more: what follows is thrown away with it.
    patience = gl.where(gl.load(lost_ptr, volatile=True) > 0, 1, patience)
    put_row(attended_ptr, narrow, ATTENDED, CHUNKS_ATTENDED)
    slot, phase, read, read_too = _multiply(
        plain, 0.0, 1.0, biases[0], x_ptr, x_ptr, firsts, own, added, made, ready, rounds, ring, full, empty, slot,
        phase, read, read_too, 0, HIDDEN, ATTENDED, False, "", BIASES[0], True, RANKS, PROGRAMS, SLOTS, UNITS,
    )  # fmt: skip
    weight = norm_weight(norms[0], mlp_offset, HIDDEN, CHUNKS_HIDDEN)
    meet(met_ptr, lost_ptr, target, patience)
    squares = put_scaled(x_ptr, weight, wide, HIDDEN, CHUNKS_HIDDEN)
    slot, phase, read, read_too = _multiply(
        scaled, squares, mlp_eps, biases[1], x_ptr, act_ptr, firsts, own, added, made, ready, rounds, ring, full, empty,
        slot, phase, read, read_too, 1, INNER, HIDDEN, True, KIND, BIASES[1], False, RANKS, PROGRAMS, SLOTS, UNITS,
    )  # fmt: skip
    meet(met_ptr, lost_ptr, target + programs, patience)
    put_row(act_ptr, narrow, INNER, CHUNKS_INNER)
    slot, phase, read, read_too = _multiply(
        plain, 0.0, 1.0, biases[2], x_ptr, x_ptr, firsts, own, added, made, ready, rounds, ring, full, empty, slot,
        phase, read, read_too, 2, HIDDEN, INNER, False, "", BIASES[2], True, RANKS, PROGRAMS, SLOTS, UNITS,
    )  # fmt: skip
    weight = norm_weight(norms[1], last_offset, HIDDEN, CHUNKS_HIDDEN)
    meet(met_ptr, lost_ptr, target + 2 * programs, patience)
    squares = put_scaled(x_ptr, weight, wide, HIDDEN, CHUNKS_HIDDEN)
    slot, phase, read, read_too = _multiply(
        scaled, squares, last_eps, biases[3], x_ptr, out_ptr, firsts, own, added, made, ready, rounds, ring, full,
        empty, slot, phase, read, read_too, 3, OUTS, HIDDEN, True, "", BIASES[3], False, RANKS, PROGRAMS, SLOTS, UNITS,
    )  # fmt: skip


@gluon.jit
def _four_products(
    o_desc, gate_up_desc, down_desc, last_desc, o_a_desc, attended_ptr, x_ptr, act_ptr, out_ptr, norms, biases, a_ptrs,
    b_ptrs, slots_ptr, shares_ptr, came_ptr, lost_ptr, mlp_eps, mlp_offset, last_eps, last_offset, patience,
    ATTENDED: gl.constexpr, HIDDEN: gl.constexpr, INNER: gl.constexpr, OUTS: gl.constexpr, KIND: gl.constexpr,
    BIASES: gl.constexpr, RANKS: gl.constexpr, ENDS: gl.constexpr, MOST_ROUNDS: gl.constexpr, PROGRAMS: gl.constexpr,
    SLOTS: gl.constexpr, UNITS: gl.constexpr, CHUNKS_ATTENDED: gl.constexpr, CHUNKS_HIDDEN: gl.constexpr,
    CHUNKS_INNER: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # One by one they come in, since the launcher of Triton 3.6 finds none in a tuple.
    descs = (o_desc, gate_up_desc, down_desc, last_desc)
    most: gl.constexpr = CHUNKS_INNER if CHUNKS_INNER > CHUNKS_ATTENDED else CHUNKS_ATTENDED
    ring = gl.allocate_shared_memory(o_desc.dtype, [SLOTS * UNITS, ROWS, LINES, LINE], o_desc.layout)
    wide = gl.allocate_shared_memory(gl.float32, [CHUNKS_HIDDEN, CHUNK], flat)
    narrow = gl.allocate_shared_memory(o_desc.dtype, [most, CHUNK], flat)
    rounds = gl.allocate_shared_memory(gl.float32, [ROUND * ROWS, 4], flat)
    own = gl.allocate_shared_memory(gl.float32, [MOST_ROUNDS + (MOST_ROUNDS == 0), ROUND * ROWS], line)
    added = gl.allocate_shared_memory(gl.float32, [2 * MOST_ROUNDS + (MOST_ROUNDS == 0), ROUND * ROWS], line)
    firsts = gl.allocate_shared_memory(gl.float32, [2 * MOST_HANDED], line)
    handed = gl.allocate_shared_memory(gl.float32, [MOST_HANDED], line)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    made = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    mbarrier.init(made, count=1)
    mbarrier.init(ready, count=1)
    if MOST_ROUNDS == 0:
        gl.warp_specialize(
            [
                (_walk, (attended_ptr, x_ptr, act_ptr, out_ptr, norms, biases, came_ptr, lost_ptr, ring, full, empty,
                         wide, narrow, rounds, firsts, own, added, made, ready, mlp_eps, mlp_offset, last_eps,
                         last_offset, patience, ATTENDED, HIDDEN, INNER, OUTS, KIND, BIASES, RANKS, PROGRAMS, SLOTS,
                         UNITS, CHUNKS_ATTENDED, CHUNKS_HIDDEN, CHUNKS_INNER, PDL)),
                (copy_all, (descs, o_a_desc, slots_ptr, ring, full, empty, ATTENDED, HIDDEN, INNER, OUTS, RANKS, SLOTS,
                         UNITS)),
            ],
            [1],
            [40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_walk, (attended_ptr, x_ptr, act_ptr, out_ptr, norms, biases, came_ptr, lost_ptr, ring, full, empty,
                         wide, narrow, rounds, firsts, own, added, made, ready, mlp_eps, mlp_offset, last_eps,
                         last_offset, patience, ATTENDED, HIDDEN, INNER, OUTS, KIND, BIASES, RANKS, PROGRAMS, SLOTS,
                         UNITS, CHUNKS_ATTENDED, CHUNKS_HIDDEN, CHUNKS_INNER, PDL)),
                (see_to_adapters, (norms, a_ptrs, b_ptrs, slots_ptr, shares_ptr, came_ptr + 1, lost_ptr,
                         firsts, handed, own, added, made, ready, mlp_offset, last_offset, patience, HIDDEN, INNER,
                         OUTS, RANKS, ENDS, PROGRAMS, PDL)),
                (copy_all, (descs, o_a_desc, slots_ptr, ring, full, empty, ATTENDED, HIDDEN, INNER, OUTS, RANKS, SLOTS,
                         UNITS)),
            ],
            [2, 1],  # as `HELPERS` says
            [96, 40],
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
    slots = (room - inputs * CHUNK.value - _BESIDE) // (2 * ROWS.value * one.columns)
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
    # One module of gate and up has one A for both, where the kernel reads two; the ends of `last` it is told.
    for step, parts in ((steps.o, 1), (steps.gate_up, 2), (steps.down, 1)):
        if step.adapter is not None and len(step.adapter.ends) != parts:
            return False
    if _rounds(steps, processors(weights[0].device.index or 0)) > MOST_ROUNDS:
        return False
    tiling = _tiling(steps)
    filled = all(4 * weight.shape[1] >= 3 * tiling.padded(weight.shape[1]) for weight in weights)
    return filled and tiling.slots >= LEAST_SLOTS


def _rounds(steps: Walk, programs: int) -> int:
    """The most rounds of a product with adapters, of its input or its outputs; 0 without any."""
    found = [0]
    for product, halves in zip(steps[:4], (1, 2, 1, 1), strict=True):
        if product.adapter is not None:
            outs, width = product.weight.shape
            found += [rounds_of(width, programs), rounds_of(outs // halves, programs)]
    return max(found)


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
    programs = processors(device.index or 0)
    _four_products[(programs,)](
        *descs, descs[0] if tables[0] is None else _lines(tables[0].a.flatten(0, 1)),
        attended, x, act, out, (gate_up.norm.weight, last.norm.weight),
        tuple(x if p.bias is None else p.bias for p in products), tuple(x if t is None else t.a for t in tables),
        tuple(x if t is None else t.b for t in tables),
        meeting.came if slots is None else slots, meeting.shares, meeting.came, meeting.lost,
        gate_up.norm.eps, gate_up.norm.offset, last.norm.eps, last.norm.offset, PATIENCE,
        *sizes, last.weight.shape[0], steps.activation, tuple(p.bias is not None for p in products),
        RANKS=tuple(0 if t is None else t.a.shape[1] for t in tables),
        ENDS=(last.weight.shape[0],) if last.adapter is None else last.adapter.ends,
        MOST_ROUNDS=_rounds(steps, programs), PROGRAMS=programs, SLOTS=tiling.slots, UNITS=tiling.units,
        CHUNKS_ATTENDED=tiling.chunks(sizes[0]), CHUNKS_HIDDEN=tiling.chunks(sizes[1]),
        CHUNKS_INNER=tiling.chunks(sizes[2]), PDL=bool(pdl), num_warps=WARPS.value, maxnreg=_REGISTERS, **pdl,
    )  # fmt: skip
    return out
