"""Parts of the walk in Gluon: the ring of tiles that one warp fills and the others empty, a row in shared memory, and
the programs' meetings. See `triton.walk`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from pronghorn.kernels.triton.gluon_parts import barrier, fetch

#: outputs that a program makes at a time; numbers of a line, which is what the copy engine swizzles
ROWS = gl.constexpr(4)
LINE = gl.constexpr(64)
#: lines of a tile
LINES = gl.constexpr(8)
#: groups of outputs whose sums wait in shared memory to be finished together
ROUND = gl.constexpr(32)
#: tiles of the input that fit into registers
MOST_KEPT = gl.constexpr(8)
#: numbers of the input that programs take at a time
CHUNK = gl.constexpr(2048)
WARPS = gl.constexpr(8)


def _awaiting(first_thread_alone: bool) -> str:
    """PTX that waits until the number at $1 is at least $2, or $3 times in vain; $0: whether it was in vain."""
    others = "mov.u32 thread, %tid.x; setp.ne.u32 p, thread, 0; @p bra DONE;" if first_thread_alone else ""
    return (
        "{ .reg .pred p; .reg .b64 seen; .reg .b32 thread, tries; mov.b32 $0, 0;"
        + others
        + """
        mov.b32 tries, $3;
        AGAIN:
        ld.acquire.gpu.global.b64 seen, [$1];
        setp.ge.s64 p, seen, $2;
        @p bra DONE;
        sub.u32 tries, tries, 1;
        setp.ne.u32 p, tries, 0;
        @p bra AGAIN;
        mov.b32 $0, 1;
        DONE:
        }"""
    )


_BY_THE_FIRST = gl.constexpr(_awaiting(first_thread_alone=True))
_BY_EACH = gl.constexpr(_awaiting(first_thread_alone=False))


@gluon.jit
def following(slot, phase, SLOTS: gl.constexpr):
    last = slot == SLOTS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def copy_tiles(desc, row, bundle, ring, full, empty, slot, phase, UNITS: gl.constexpr):
    mbarrier.wait(empty.index(slot), phase)
    bar = full.index(slot)
    mbarrier.expect(bar, UNITS * ROWS * LINES * LINE * 2)
    for u in gl.static_range(UNITS):
        fetch(desc, [row, (bundle * UNITS + u) * LINES, 0], bar, ring.index(slot * UNITS + u))


@gluon.jit
def copy_weight(
    desc, ring, full, empty, slot, phase, outs: gl.constexpr, width: gl.constexpr, GLU: gl.constexpr,
    SLOTS: gl.constexpr, UNITS: gl.constexpr,
):  # fmt: skip
    """A program's rows of one weight; with GLU each of gate's beside up's."""
    bundles: gl.constexpr = (width + UNITS * LINES * LINE - 1) // (UNITS * LINES * LINE)
    for group in range(gl.program_id(0), outs // ROWS, gl.num_programs(0)):
        for bundle in range(bundles):
            copy_tiles(desc, group * ROWS, bundle, ring, full, empty, slot, phase, UNITS)
            slot, phase = following(slot, phase, SLOTS)
            if GLU:
                copy_tiles(desc, outs + group * ROWS, bundle, ring, full, empty, slot, phase, UNITS)
                slot, phase = following(slot, phase, SLOTS)
    return slot, phase


@gluon.jit
def copy_all(
    descs, a_desc, slots_ptr, ring, full, empty, ATTENDED: gl.constexpr, HIDDEN: gl.constexpr, INNER: gl.constexpr,
    OUTS: gl.constexpr, RANKS: gl.constexpr, SLOTS: gl.constexpr, UNITS: gl.constexpr,
):  # fmt: skip
    """The copying warp. Of the first product's adapter it brings all of A's rows, into every program's ring."""
    slot = 0
    phase = 1
    outs: gl.constexpr = (HIDDEN, INNER, HIDDEN, OUTS)
    widths: gl.constexpr = (ATTENDED, HIDDEN, INNER, HIDDEN)
    if RANKS[0] > 0:
        first = gl.load(slots_ptr) * RANKS[0]
        bundles: gl.constexpr = (ATTENDED + UNITS * LINES * LINE - 1) // (UNITS * LINES * LINE)
        for group in range(RANKS[0] // ROWS):
            for bundle in range(bundles):
                copy_tiles(a_desc, first + group * ROWS, bundle, ring, full, empty, slot, phase, UNITS)
                slot, phase = following(slot, phase, SLOTS)
    for i in gl.static_range(4):
        slot, phase = copy_weight(
            descs[i], ring, full, empty, slot, phase, outs[i], widths[i], i == 1, SLOTS, UNITS
        )


@gluon.jit
def meet(met_ptr, lost_ptr, target, patience, BY_EACH: gl.constexpr = False):
    """Wait until all programs have come here, and all that they wrote can be read; one that waits in vain says so.

    BY_EACH: few threads look for themselves, instead of one that the others wait for.
    """
    AWAIT: gl.constexpr = _BY_EACH if BY_EACH else _BY_THE_FIRST
    barrier()
    gl.atomic_add(met_ptr, target * 0 + 1, sem="release", scope="gpu")
    late = gl.inline_asm_elementwise(
        AWAIT, "=r,l,l,r", [met_ptr, target, patience], dtype=gl.int32, is_pure=False, pack=1
    )
    gl.atomic_add(lost_ptr, target * 0 + 1, mask=late > 0, sem="relaxed", scope="gpu")
    if not BY_EACH:
        barrier()


@gluon.jit
def places_of(width: gl.constexpr, CHUNKS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [1, WARPS], [1, 0])
    chunk = gl.arange(0, CHUNKS, gl.SliceLayout(1, layout))
    at = chunk[:, None] * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, layout))[None, :]
    return at, at < width


@gluon.jit
def put_row(x_ptr, xs, width: gl.constexpr, CHUNKS: gl.constexpr):
    """x into shared memory, zeros behind it."""
    at, known = places_of(width, CHUNKS)
    # Past the first cache, which knows nothing of what other processors have written.
    xs.slice(0, CHUNKS).store(gl.load(x_ptr + at, mask=known, other=0.0, cache_modifier=".cg"))


@gluon.jit
def norm_weight(norm_ptr, offset, width: gl.constexpr, CHUNKS: gl.constexpr):
    at, known = places_of(width, CHUNKS)
    return gl.load(norm_ptr + at, mask=known, other=0.0).to(gl.float32) + offset


@gluon.jit
def put_scaled(x_ptr, weight, xs, width: gl.constexpr, CHUNKS: gl.constexpr):
    """x times the norm's weight into shared memory; each thread's sums of squares, which others wait for later."""
    at, known = places_of(width, CHUNKS)
    x = gl.load(x_ptr + at, mask=known, other=0.0, cache_modifier=".cg").to(gl.float32)
    xs.store(x * weight)
    return gl.sum(gl.reshape(x * x, [CHUNKS, CHUNK // 8, 8]), 2)


@gluon.jit
def inverse_rms(squares, eps, width: gl.constexpr):
    """1 / rms(x)."""
    return 1.0 / gl.sqrt(gl.sum(gl.sum(squares, 1), 0) / width + eps)


@gluon.jit
def loaded_tiles(tiles, first, layout: gl.constexpr, COUNT: gl.constexpr):
    """COUNT neighbouring tiles as they are."""
    found = ()
    for i in gl.static_range(COUNT):
        found = found + (tiles.index(first + i).load(layout),)  # type: ignore[assignment] # noqa: RUF005
    return found


@gluon.jit
def widened(tiles, COUNT: gl.constexpr):
    found = ()
    for i in gl.static_range(COUNT):
        found = found + (tiles[i].to(gl.float32),)  # type: ignore[assignment] # noqa: RUF005
    return found


@gluon.jit
def added_to(acc, weights, x, FIRST: gl.constexpr, UNITS: gl.constexpr):
    for u in gl.static_range(UNITS):
        acc += weights[u].to(gl.float32) * gl.expand_dims(x[FIRST + u].to(gl.float32), 0)
    return acc


@gluon.jit
def halves_of(acc):
    """Sums [ROWS, 2] of what the two warps of a row hold."""
    return gl.sum(gl.reshape(acc, [ROWS, 2, LINES * LINE // 2]), 2)


@gluon.jit
def with_one_more(sums, others, x, FIRST: gl.constexpr, ring, full, empty, slot, phase, read, read_too,
          GLU: gl.constexpr, SLOTS: gl.constexpr, UNITS: gl.constexpr):  # fmt: skip
    """The sums with one more slot of the ring, with GLU with two; the slots that were read before are given back.

    Not those of this step: what a warp reads may be on its way still when all have come to the barrier, and the copy
    engine does not queue behind it. Once a warp comes to the next barrier it has multiplied what it read.
    """
    layout: gl.constexpr = sums.type.layout
    next_slot, next_phase = following(slot, phase, SLOTS)
    up_slot = next_slot
    mbarrier.wait(full.index(slot), phase)
    if GLU:
        mbarrier.wait(full.index(up_slot), next_phase)
        next_slot, next_phase = following(next_slot, next_phase, SLOTS)
    weights = loaded_tiles(ring, slot * UNITS, layout, UNITS)
    if GLU:
        up_weights = loaded_tiles(ring, up_slot * UNITS, layout, UNITS)
    barrier()
    mbarrier.arrive(empty.index(gl.maximum(read, 0)), count=1, pred=read >= 0)
    mbarrier.arrive(empty.index(gl.maximum(read_too, 0)), count=1, pred=read_too >= 0)
    if GLU:
        others = added_to(others, up_weights, x, FIRST, UNITS)
    sums = added_to(sums, weights, x, FIRST, UNITS)
    return sums, others, next_slot, next_phase, slot, up_slot if GLU else slot * 0 - 1


@gluon.jit
def next_rows(xs, kept, ring, full, empty, slot, phase, read, read_too, bundles: gl.constexpr, KEPT: gl.constexpr,
           GLU: gl.constexpr, SLOTS: gl.constexpr, UNITS: gl.constexpr):  # fmt: skip
    """The next rows in the ring times x, not yet added up; with GLU gate's and up's."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4, 8], [ROWS, WARPS // ROWS, 1], [2, 1, 0])
    of_x: gl.constexpr = gl.SliceLayout(0, layout)
    sums = gl.zeros([ROWS, LINES, LINE], gl.float32, layout)
    others = gl.zeros([ROWS, LINES, LINE], gl.float32, layout)
    if KEPT:
        for bundle in gl.static_range(bundles):
            sums, others, slot, phase, read, read_too = with_one_more(
                sums, others, kept, bundle * UNITS, ring, full, empty, slot, phase, read, read_too, GLU, SLOTS, UNITS
            )  # fmt: skip
    else:
        for bundle in range(bundles):
            x = loaded_tiles(xs, bundle * UNITS, of_x, UNITS)
            sums, others, slot, phase, read, read_too = with_one_more(
                sums, others, x, 0, ring, full, empty, slot, phase, read, read_too, GLU, SLOTS, UNITS
            )
    return sums, others, slot, phase, read, read_too
