"""The walk's adapters, which two warps of their own see to while the others multiply weights. See `triton.walk`.

Of a product whose input the walk has made they take what their program has of it, multiply A's columns of that, leave
the sums for all other programs, and wait for theirs in a meeting of their own. Of o, whose input attention has made,
every program multiplies all of A's rows, which its ring has brought while attention ran: a meeting would take longer
than o does. B times the sums waits in shared memory for the outputs that it is added to.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from pronghorn.kernels import walk
from pronghorn.kernels.triton.gluon_parts import barrier, wait_for_last
from pronghorn.kernels.triton.walk_parts import ROUND, ROWS, meet

#: numbers between an adapter's two factors, of all parts of a product
MOST_HANDED = gl.constexpr(walk.MOST_HANDED)
#: warps that see to adapters; with the one that copies they are four, as many as registers are given out to
HELPERS = gl.constexpr(2)


@gluon.constexpr_function
def room_for(ranks: int) -> int:
    """A power of two."""
    return max(16, 1 << (ranks - 1).bit_length())


@gluon.constexpr_function
def rounds_of(width: int, programs: int) -> int:
    """How many rounds of groups a program has of so many outputs at most."""
    return -((width // ROWS.value + programs - 1) // programs // -ROUND.value)


@gluon.constexpr_function
def groups_of(width: int, programs: int) -> int:
    """How many groups of outputs a program has in a round at most, as a power of two."""
    most = (width // ROWS.value + programs - 1) // programs
    return min(1 << (most - 1).bit_length(), ROUND.value)


@gluon.constexpr_function
def columns_layout(width: int, programs: int) -> gl.BlockedLayout:
    """Of A's columns [ranks, elements] for the elements that a program has in a round."""
    groups = groups_of(width, programs)
    return gl.BlockedLayout([1, ROWS.value], [32 // groups, groups], [HELPERS.value, 1], [1, 0])


@gluon.constexpr_function
def phase_of(ranks: tuple[int, ...], product: int) -> int:
    """Of a barrier that each product with adapters completes once."""
    return sum(rank > 0 for rank in ranks[:product]) % 2


@gluon.jit
def _elements(j, round: gl.constexpr, PROGRAMS: gl.constexpr):
    """The j-th elements that this program has in a round."""
    return (gl.program_id(0) + (round * ROUND + j // ROWS) * PROGRAMS) * ROWS + j % ROWS


@gluon.jit
def _columns(a_ptr, width: gl.constexpr, RANKS: gl.constexpr, PROGRAMS: gl.constexpr):
    """A's columns of what this program has of x, a tile for each round."""
    layout: gl.constexpr = columns_layout(width, PROGRAMS)
    r = gl.expand_dims(gl.arange(0, room_for(RANKS), gl.SliceLayout(1, layout)), 1)
    j = gl.arange(0, ROWS * groups_of(width, PROGRAMS), gl.SliceLayout(0, layout))
    found = ()
    for round in gl.static_range(rounds_of(width, PROGRAMS)):
        at = gl.expand_dims(_elements(j, round, PROGRAMS), 0)
        tile = gl.load(a_ptr + r * width + at, mask=(r < RANKS) & (at < width), other=0.0)
        found = found + (tile,)  # type: ignore[assignment] # noqa: RUF005
    return found


@gluon.jit
def _leave_share(
    columns, own, norm_ptr, offset, shares_ptr, width: gl.constexpr, NORM: gl.constexpr, RANKS: gl.constexpr,
    PROGRAMS: gl.constexpr,
):  # fmt: skip
    """The columns times what this program has of x."""
    layout: gl.constexpr = columns_layout(width, PROGRAMS)
    MANY: gl.constexpr = ROWS * groups_of(width, PROGRAMS)
    j = gl.arange(0, MANY, gl.SliceLayout(0, layout))
    r = gl.arange(0, room_for(RANKS), gl.SliceLayout(1, layout))
    share = gl.zeros([room_for(RANKS)], gl.float32, gl.SliceLayout(1, layout))
    for round in gl.static_range(rounds_of(width, PROGRAMS)):
        at = _elements(j, round, PROGRAMS)
        # A program that has nothing in the last round has not written what lies there, which may be no number.
        x = gl.where(at < width, own.index(round).slice(0, MANY).load(gl.SliceLayout(0, layout)), 0.0)
        if NORM:
            x *= gl.load(norm_ptr + at, mask=at < width, other=0.0).to(gl.float32) + offset
        share += gl.sum(columns[round].to(gl.float32) * gl.expand_dims(x, 0), 1)
    gl.store(shares_ptr + gl.program_id(0) * RANKS + r, share, mask=r < RANKS)


@gluon.jit
def _rows_of_b(b_ptr, outs: gl.constexpr, RANK: gl.constexpr, PARTS: gl.constexpr, PROGRAMS: gl.constexpr):
    """B's rows of this program's outputs, a tile for each part of a round."""
    layout: gl.constexpr = gl.BlockedLayout([1, RANK], [32, 1], [HELPERS, 1], [1, 0])
    j = gl.arange(0, ROWS * groups_of(outs, PROGRAMS), gl.SliceLayout(1, layout))
    r = gl.expand_dims(gl.arange(0, RANK, gl.SliceLayout(0, layout)), 0)
    found = ()
    for round in gl.static_range(rounds_of(outs, PROGRAMS)):
        row = gl.expand_dims(_elements(j, round, PROGRAMS), 1)
        for part in gl.static_range(PARTS):
            tile = gl.load(b_ptr + (part * outs + row) * RANK + r, mask=row < outs, other=0.0)
            found = found + (tile,)  # type: ignore[assignment] # noqa: RUF005
    return found


@gluon.jit
def _sum_shares(shares_ptr, handed, RANKS: gl.constexpr, PROGRAMS: gl.constexpr):
    """What all programs have left, added up, into shared memory; read past the first cache."""
    ROOM: gl.constexpr = room_for(RANKS)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // ROOM, ROOM // 4], [HELPERS, 1], [1, 0])
    tall: gl.constexpr = HELPERS * 128 // ROOM
    TILES: gl.constexpr = (PROGRAMS + tall - 1) // tall
    TOGETHER: gl.constexpr = TILES if TILES < 12 else 12
    p = gl.expand_dims(gl.arange(0, tall, gl.SliceLayout(1, layout)), 1)
    r = gl.expand_dims(gl.arange(0, ROOM, gl.SliceLayout(0, layout)), 0)
    total = gl.zeros([tall, ROOM], gl.float32, layout)
    for first in range(0, PROGRAMS, TOGETHER * tall):
        for i in gl.static_range(TOGETHER):
            program = first + i * tall + p
            at = shares_ptr + program * RANKS + r
            total += gl.load(at, mask=(program < PROGRAMS) & (r < RANKS), other=0.0, cache_modifier=".cg")
    handed.slice(0, ROOM).store(gl.sum(total, 0))
    barrier()


@gluon.jit
def _put_added(b, handed, added, outs: gl.constexpr, RANK: gl.constexpr, PARTS: gl.constexpr, ENDS: gl.constexpr,
               PROGRAMS: gl.constexpr):  # fmt: skip
    """B times the sums into shared memory. Of q, k and v, or of gate and up, each has numbers of its own among them."""
    layout: gl.constexpr = gl.BlockedLayout([1, RANK], [32, 1], [HELPERS, 1], [1, 0])
    MANY: gl.constexpr = ROWS * groups_of(outs, PROGRAMS)
    j = gl.arange(0, MANY, gl.SliceLayout(1, layout))
    for round in gl.static_range(rounds_of(outs, PROGRAMS)):
        for part in gl.static_range(PARTS):
            rows = b[round * PARTS + part].to(gl.float32)
            y = _times(rows, handed, part, RANK)
            if PARTS == 1:
                for other in gl.static_range(1, len(ENDS)):
                    first = _elements(j, round, PROGRAMS) < ENDS[other - 1]
                    y = gl.where(first, y, _times(rows, handed, other, RANK))
            added.index(round * 2 + part).slice(0, MANY).store(y)


@gluon.jit
def _times(rows, handed, part: gl.constexpr, RANK: gl.constexpr):
    xa = handed.slice(part * RANK, RANK).load(gl.SliceLayout(0, rows.type.layout))
    return gl.sum(rows * gl.expand_dims(xa, 0), 1)


@gluon.jit
def _see_to_first(
    adapter,
    b_ptr,
    halves,
    handed,
    added,
    made,
    ready,
    outs: gl.constexpr,
    RANK: gl.constexpr,
    PROGRAMS: gl.constexpr,
):
    """The adapters of o, whose A x the multiplying warps leave in halves [2 · ranks]."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [HELPERS], [0])
    b = _rows_of_b(b_ptr + adapter * (outs * RANK), outs, RANK, 1, PROGRAMS)
    mbarrier.wait(made, 0)
    both = gl.reshape(halves.slice(0, 2 * RANK).load(flat), [RANK, 2])
    handed.slice(0, RANK).store(gl.sum(both, 1))
    barrier()
    _put_added(b, handed, added, outs, RANK, 1, (outs,), PROGRAMS)
    barrier()
    mbarrier.arrive(ready, count=1)


@gluon.jit
def _see_to(
    adapter, norm_ptr, offset, a_ptr, b_ptr, shares_ptr, met_ptr, lost_ptr, target, patience, handed, own, added, made,
    ready, PRODUCT: gl.constexpr, width: gl.constexpr, outs: gl.constexpr, NORM: gl.constexpr, PARTS: gl.constexpr,
    ENDS: gl.constexpr, RANKS: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """The adapters of another product; `PARTS`: gate and up are two."""
    MINE: gl.constexpr = RANKS[PRODUCT]
    RANK: gl.constexpr = MINE // len(ENDS)
    columns = _columns(a_ptr + adapter * (MINE * width), width, MINE, PROGRAMS)
    mbarrier.wait(made, phase_of(RANKS, PRODUCT))
    _leave_share(columns, own, norm_ptr, offset, shares_ptr, width, NORM, MINE, PROGRAMS)
    # On their way while others are waited for.
    b = _rows_of_b(b_ptr + adapter * (PARTS * outs * RANK), outs, RANK, PARTS, PROGRAMS)
    meet(met_ptr, lost_ptr, target, patience, BY_EACH=True)
    _sum_shares(shares_ptr, handed, MINE, PROGRAMS)
    _put_added(b, handed, added, outs, RANK, PARTS, ENDS, PROGRAMS)
    barrier()
    mbarrier.arrive(ready, count=1)


@gluon.jit
def see_to_adapters(
    norms, a_ptrs, b_ptrs, slots_ptr, shares_ptr, met_ptr, lost_ptr, halves, handed, own, added, made, ready,
    mlp_offset, last_offset, patience, HIDDEN: gl.constexpr, INNER: gl.constexpr, OUTS: gl.constexpr,
    RANKS: gl.constexpr, ENDS: gl.constexpr, PROGRAMS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The warps that see to adapters."""
    adapter = gl.load(slots_ptr)
    if RANKS[0] > 0:
        _see_to_first(adapter, b_ptrs[0], halves, handed, added, made, ready, HIDDEN, RANKS[0], PROGRAMS)
    if PDL:
        wait_for_last()
    programs = gl.num_programs(0).to(gl.int64)
    # A launch adds the programs once for each further product with adapters; some may have come to the first meeting.
    begun = gl.load(met_ptr, volatile=True)
    target = begun - begun % programs + programs
    patience = gl.where(gl.load(lost_ptr, volatile=True) > 0, 1, patience)
    # Of two products shares are read and left at the same time.
    if RANKS[1] > 0:
        _see_to(
            adapter, norms[0], mlp_offset, a_ptrs[1], b_ptrs[1], shares_ptr, met_ptr, lost_ptr, target, patience,
            handed, own, added, made, ready, 1, HIDDEN, INNER, True, 2, (INNER, 2 * INNER), RANKS, PROGRAMS,
        )  # fmt: skip
        target += programs
        shares_ptr += PROGRAMS * RANKS[1]
    if RANKS[2] > 0:
        _see_to(
            adapter, norms[0], 0.0, a_ptrs[2], b_ptrs[2], shares_ptr, met_ptr, lost_ptr, target, patience, handed, own,
            added, made, ready, 2, INNER, HIDDEN, False, 1, (HIDDEN,), RANKS, PROGRAMS,
        )  # fmt: skip
        target += programs
        shares_ptr += PROGRAMS * RANKS[2]
    if RANKS[3] > 0:
        _see_to(
            adapter, norms[1], last_offset, a_ptrs[3], b_ptrs[3], shares_ptr, met_ptr, lost_ptr, target, patience,
            handed, own, added, made, ready, 3, HIDDEN, OUTS, True, 1, ENDS, RANKS, PROGRAMS,
        )  # fmt: skip
