"""4-bit weights times one row on the matrix units, in whole numbers, written in Gluon (Triton's language of explicit
layouts).

    Σ T[code] x = (Σ V[code] X - V0 Σ X) · step / 8191,    V = 8191 T + V0,  V0 = 8191,  X = x / step

The table's numbers T are in [-1, 1], V in 14 bits that two bytes hold, seven in each: 128 high + low. A byte whose
first bit is zero can be looked up by all four bits of a code: a permutation fills what a code's highest bit sends to
the other half of the table with zeros, so that two of them and a sum give four codes' bytes, in the places where the
matrix units want them. x is two digits of base 128 in the same way, its step the largest number / 16256: in the
length of the vector off by √columns / 2^15.8 at most, at 4,096 columns what rounding to bf16 costs. Both digits ride
in one product, whose right side has eight columns. All sums of a block of 64 are exact.

The matrix units multiply two sets of eight outputs at a time: gate and up of the same eight, or neighbours of one
weight. A lane has a whole block of one output of each, 32 bytes of codes that lie together, so that its loads touch few
lines of memory, for which this waits more than for arithmetic; the order of columns is free as long as x has the same.
Four lanes' blocks would run into one sum: the eight columns of x's side are two digits of four blocks, each zero where
another lane's block is multiplied. So every lane ends with its own block's two sums of its outputs, and multiplies them
by its own scale. (Gate and up of 8B on an H200, one group a program: 29.6 µs, and 32.1 with eight bytes of each of four
blocks a lane.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pronghorn.kernels.matvec import FourBit, RowNorm, RowShare
from pronghorn.kernels.triton.gluon_parts import activated, barrier, launch_next, view, wait_for_last
from pronghorn.kernels.triton.launch import dependent_launch, unit_rows
from pronghorn.kernels.triton.matvec import arguments

#: columns of a block of weights, and of what a warp takes at a time
BLOCK = gl.constexpr(64)
BLOCKS = gl.constexpr(4)
#: outputs that the matrix units take of each of the two sets
SET = gl.constexpr(8)
#: by what is multiplied, one weight, several, or gate and up: warps of a program
WARPS = (16, 8, 4)
#: groups of outputs that a program takes one after the other, for which x's digits are made once (gate and up, µs: one
#: 29.6, two 28.2, three 28.7). With more than one, several weights would have to end where groups do
GROUPS = (1, 1, 2)
#: of a thread, with an adapter: no more than let as many programs run at once as without. Gate and up would take 103
ADAPTED_REGISTERS = (64, 80, 96)
#: with fewer numbers in all `matvec_4bit` may be as fast; measured with 17 and 59, 25, and 117 million
LEAST_NUMBERS = (1 << 24, 1 << 24, 1 << 26)
#: of one weight, as many as run at once: 16 of each of two programs of an H200's 132 processors; not measured with more
MOST_OUTPUTS = 2 * 132 * 16
#: columns of x whose digits fit into shared memory
MOST_COLUMNS = 1 << 16
#: V of the table's zero, and of its one twice as much
ZERO = gl.constexpr(8191)
#: x's largest number in steps: 127 · 128
MOST = gl.constexpr(16256.0)
# fp32 numbers from 2^23 on are whole: added to this one, a number is rounded into its low bits.
_ROUNDER = gl.constexpr(12582912.0)
_ROUNDED_TO_64 = gl.constexpr(0x4B400000 - 64)

# A word's eight codes as two words of high bytes and two of low ones. A permutation takes four selectors of four bits,
# the codes themselves: of codes 0 to 7 a byte out of the first half of the table, of others zero; with the highest bits
# turned round the other half.
_FOUR = """
    prmt.b32 p, %(t0)s, %(t1)s, %(one)s; prmt.b32 q, %(t2)s, %(t3)s, %(other)s; add.s32 h%(to)d, p, q;
    prmt.b32 p, %(t4)s, %(t5)s, %(one)s; prmt.b32 q, %(t6)s, %(t7)s, %(other)s; add.s32 l%(to)d, p, q;
"""
_WORD = "xor.b32 other, %s, 0x88888888; %s shr.b32 one, %s, 16; shr.b32 other, other, 16; %s"
_PRODUCT = """
    mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32
        {%(c)s0, %(c)s1, %(c)s2, %(c)s3}, {%(of)s0, %(of)s1, %(of)s2, %(of)s3}, {x%(first)d, x%(second)d},
        {%(c)s0, %(c)s1, %(c)s2, %(c)s3};
"""


def _assembly() -> str:
    """$0 to $3: a block's sums of an output of the first set with x's high and low digits, then of the second; $4 to
    $7, $8 to $11: their codes; $12 to $19: one digit of x; $20 to $27: the table."""
    t = {f"t{i}": f"${20 + i}" for i in range(8)}
    lines = [
        "{ .reg .b32 one, other, p, q, first<8>, second<8>, x<16>, h<4>, l<4>; .reg .s32 c<4>, d<4>;",
        *(f"mov.b64 {{first{2 * i}, first{2 * i + 1}}}, ${4 + i};" for i in range(4)),
        *(f"mov.b64 {{second{2 * i}, second{2 * i + 1}}}, ${8 + i};" for i in range(4)),
        *(f"mov.b64 {{x{2 * i}, x{2 * i + 1}}}, ${12 + i};" for i in range(8)),
        *(f"mov.s32 c{i}, 0; mov.s32 d{i}, 0;" for i in range(4)),
    ]
    for word in range(8):
        for at, name in enumerate(("first", "second")):
            w = f"{name}{word}"
            four = [
                _FOUR % {"one": one, "other": "other", "to": 2 * i + at, **t}
                for i, one in enumerate((w, "one"))
            ]
            lines.append(_WORD % (w, four[0], w, four[1]))
        for of, c in (("h", "c"), ("l", "d")):
            lines.append(_PRODUCT % {"c": c, "of": of, "first": 2 * word, "second": 2 * word + 1})
    return "\n".join([*lines, *(f"mad.lo.s32 ${i}, c{i}, 128, d{i};" for i in range(4)), "}"])


_SUMS = gl.constexpr(_assembly())
_REGISTERS = gl.constexpr(",".join(["=&r"] * 4 + ["l"] * 16 + ["r"] * 8))


@gluon.jit
def _inside(block, width: gl.constexpr, COLUMNS: gl.constexpr):
    """Whether blocks are columns of the weight; all are where steps are whole."""
    if width % COLUMNS == 0:
        return True
    else:
        return block < width // BLOCK


@gluon.jit
def _codes(packed_ptr, row, step, known, width: gl.constexpr, of_scales: gl.constexpr, WARPS: gl.constexpr):
    """A step's block of those rows, 32 bytes a lane, four times [WARPS, 4, 2, 4]."""
    wide: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 1, 4], [1, 4, 2, 4, 1], [WARPS, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    outer: gl.constexpr = gl.SliceLayout(4, wide)
    of_warps: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, outer)))
    of_lanes: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, outer)))
    of_words: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, wide))))
    warp = gl.arange(0, WARPS, of_warps)[:, None, None, None]
    block = (step * WARPS + warp) * BLOCKS + gl.arange(0, BLOCKS, of_lanes)[None, None, None, :]
    known = known & _inside(block, width, WARPS * BLOCKS * BLOCK)
    at = gl.convert_layout(row, outer) * (width // 16) + block * 4
    words = gl.arange(0, 4, of_words)[None, None, None, None, :]
    if width % (WARPS * BLOCKS * BLOCK) == 0:
        found = gl.load(packed_ptr + at[:, :, :, :, None] + words, mask=known, other=0)
    else:
        found = gl.load(packed_ptr + at[:, :, :, :, None] + words, mask=known[:, :, :, :, None], other=0)
    even, odd = gl.split(gl.reshape(found, [WARPS, 4, 2, 4, 2, 2]))
    c0, c2 = gl.split(even)
    c1, c3 = gl.split(odd)
    return (
        gl.convert_layout(c0, of_scales), gl.convert_layout(c1, of_scales), gl.convert_layout(c2, of_scales),
        gl.convert_layout(c3, of_scales),
    )  # fmt: skip


@gluon.jit
def _scale_codes(
    absmax_ptr, coarse_ptr, row, step, known, width: gl.constexpr, layout: gl.constexpr, WARPS: gl.constexpr,
    SIZE2: gl.constexpr, NESTED: gl.constexpr,
):  # fmt: skip
    """What the scales of the same blocks are made of, one of four blocks a lane, [WARPS, 4, 2, 4]."""
    of_warps: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout)))
    of_lanes: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    warp = gl.arange(0, WARPS, of_warps)[:, None, None, None]
    block = (step * WARPS + warp) * BLOCKS + gl.arange(0, BLOCKS, of_lanes)[None, None, None, :]
    known = known & _inside(block, width, WARPS * BLOCKS * BLOCK)
    at = row * (width // BLOCK) + block
    if NESTED:
        coarse = gl.load(coarse_ptr + at // SIZE2, mask=known, other=0.0)
        return gl.load(absmax_ptr + at, mask=known, other=0), coarse
    else:
        return gl.load(absmax_ptr + at, mask=known, other=0.0), 0.0


@gluon.jit
def _scale(code, coarse, fine_ptr, shift, NESTED: gl.constexpr):
    if NESTED:
        return gl.load(fine_ptr + code.to(gl.int32)) * coarse + shift
    else:
        return code


@gluon.jit
def _scaled(x_ptr, norm_ptr, column, offset, WIDTH: gl.constexpr, NORM: gl.constexpr, COLUMNS: gl.constexpr):
    """x, and x times the norm's weight where there is one, fp32; zero beyond x's end."""
    inside = _inside(column // BLOCK, WIDTH, COLUMNS)
    x = gl.load(x_ptr + column, mask=inside, other=0.0).to(gl.float32)
    if NORM:
        return x, x * (gl.load(norm_ptr + column, mask=inside, other=0.0).to(gl.float32) + offset)
    else:
        return x, x


@gluon.jit
def _put(
    x_ptr, norm_ptr, digits, totals, eps, offset, WIDTH: gl.constexpr, NORM: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """x's digits into shared memory, int8 [STEPS, blocks, 2, BLOCK], and their sums over blocks, int32 [STEPS, blocks,
    2]; what a step of x is, times 1 / rms(x) where there is a norm."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    COLUMNS: gl.constexpr = WARPS * BLOCKS * BLOCK
    STEPS: gl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    column = gl.arange(0, COLUMNS, layout)
    square = gl.zeros([COLUMNS], gl.float32, layout)
    most = gl.zeros([COLUMNS], gl.float32, layout)
    for i in range(STEPS):
        x, v = _scaled(x_ptr, norm_ptr, i * COLUMNS + column, offset, WIDTH, NORM, COLUMNS)
        square += x * x
        most = gl.maximum(most, gl.abs(v))
    size = gl.sum(square, 0)
    step = gl.maximum(gl.max(most, 0), 1e-30) / MOST
    for i in range(STEPS):
        _, v = _scaled(x_ptr, norm_ptr, i * COLUMNS + column, offset, WIDTH, NORM, COLUMNS)
        whole = (v * (1.0 / step) + _ROUNDER).to(gl.int32, bitcast=True) - _ROUNDED_TO_64
        # Codes lie in pairs, the second in a byte's low half.
        even, odd = gl.split(gl.reshape(whole, [COLUMNS // 2, 2]))
        whole = gl.reshape(gl.join(odd, even), [WARPS * BLOCKS, BLOCK])
        both = gl.permute(gl.join(whole >> 7, (whole & 127) - 64), [0, 2, 1])
        digits.index(i).store(both.to(gl.int8))
        totals.index(i).store(gl.sum(both, 2))
    barrier()
    # What is no number must show, and digits do not.
    if NORM:
        return step / gl.sqrt(size / WIDTH + eps)
    else:
        return step + size * 0.0


@gluon.jit
def _lanes_x(octets, step, mine, of_scales: gl.constexpr, WARPS: gl.constexpr):
    """The digits of a lane's block where the column is of that block, else zero: eight times eight."""
    whole: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 1, 8], [1, 4, 2, 4, 1], [WARPS, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    x = octets.index(step).permute((0, 2, 1, 3)).load(gl.SliceLayout(1, whole))
    even, odd = gl.split(gl.reshape(x, [WARPS, 2, 4, 2, 2, 2]))
    e0, e1 = gl.split(even)
    o0, o1 = gl.split(odd)
    x0, x4 = gl.split(e0)
    x2, x6 = gl.split(e1)
    x1, x5 = gl.split(o0)
    x3, x7 = gl.split(o1)
    return (
        _own(x0, mine, of_scales), _own(x1, mine, of_scales), _own(x2, mine, of_scales), _own(x3, mine, of_scales),
        _own(x4, mine, of_scales), _own(x5, mine, of_scales), _own(x6, mine, of_scales), _own(x7, mine, of_scales),
    )  # fmt: skip


@gluon.jit
def _own(x, mine, of_scales: gl.constexpr):
    return gl.where(mine, gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, of_scales)), 1), 0)


@gluon.jit
def _lanes_totals(totals, step, of_scales: gl.constexpr, WARPS: gl.constexpr):
    """V0 times the digits' sums of the block whose scale a lane has, [WARPS, 1, 1, 4] each."""
    whole: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 1, 2], [1, 4, 2, 4, 1], [WARPS, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    found = totals.index(step).load(gl.SliceLayout(1, gl.SliceLayout(2, whole)))
    high, low = gl.split(found * ZERO)
    by_lane: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, of_scales))
    high, low = gl.convert_layout(high, by_lane), gl.convert_layout(low, by_lane)
    return gl.expand_dims(gl.expand_dims(high, 1), 2), gl.expand_dims(gl.expand_dims(low, 1), 2)


@gluon.jit
def _residual(residual_ptr, to, of_scales: gl.constexpr):
    """What a set's outputs from `to` on are added to, fp32, laid out as their sums are."""
    layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(3, of_scales))
    own = 2 * gl.arange(0, 4, gl.SliceLayout(1, layout))[:, None]
    own += gl.arange(0, 2, gl.SliceLayout(0, layout))[None, :]
    return gl.reshape(gl.load(residual_ptr + to + own).to(gl.float32), [SET])


@gluon.jit
def _share(b_ptr, slots_ptr, xa_ptr, row, outs, end0, end1, R: gl.constexpr, WARPS: gl.constexpr):
    """What an adapter adds to eight outputs from `row` on, fp32."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])
    slot = gl.load(slots_ptr)
    own = row + gl.arange(0, SET, gl.SliceLayout(1, layout))
    r = gl.arange(0, R, gl.SliceLayout(0, layout))[None, :]
    b = gl.load(b_ptr + (slot.to(gl.int64) * outs + own)[:, None] * R + r, mask=slot > 0, other=0.0)
    part = (own >= end0).to(gl.int32) + (own >= end1).to(gl.int32)
    return gl.sum(b.to(gl.float32) * gl.load(xa_ptr + part[:, None] * R + r), 1)


@gluon.jit
def _finished(
    sums, by_x, to, bias_ptr, b_ptr, slots_ptr, xa_ptr, outs, end0, end1, BIAS: gl.constexpr, R: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """A set's outputs from `to` on, with what is added to them."""
    y = gl.reshape(gl.sum(gl.sum(sums, 3), 0), [SET]) * by_x
    if BIAS:
        y += gl.load(bias_ptr + to + gl.arange(0, SET, y.type.layout)).to(gl.float32)
    if R > 0:
        share = _share(b_ptr, slots_ptr, xa_ptr, to, outs, end0, end1, R, WARPS)
        y += gl.convert_layout(share, y.type.layout)
    return y


@gluon.jit
def _one_row(
    x_ptr, packed0, packed1, packed2, absmax0, absmax1, absmax2, coarse0, coarse1, coarse2, shift0, shift1, shift2,
    fine0, fine1, fine2, table_ptr, norm_ptr, bias_ptr, residual_ptr, out_ptr, slots_ptr, xa_ptr, b_ptr, rows, rows0,
    rows1, outs, end0, end1, eps, offset, groups, nothing, WIDTH: gl.constexpr, NORM: gl.constexpr,
    BIAS: gl.constexpr, RESIDUAL: gl.constexpr, GLU: gl.constexpr, R: gl.constexpr, PARTS: gl.constexpr,
    NESTED: gl.constexpr, SIZE2: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """So many groups of two sets of outputs a program, one after the other. nothing: 0."""
    # Lanes as the matrix units number them: four columns, then eight outputs, which are the columns of x's digits, too.
    of_scales: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1], [1, 4, 2, 4], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    COLUMNS: gl.constexpr = WARPS * BLOCKS * BLOCK
    STEPS: gl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    # gate's and up's outputs have the same numbers; of one weight the second set follows the first.
    GROUP: gl.constexpr = SET if GLU != "" else 2 * SET
    first = gl.program_id(0) * (GROUP * groups)
    groups = gl.minimum(groups, (rows - first) // GROUP)
    packed, absmax, coarse, shift_ptr, fine = packed0, absmax0, coarse0, shift0, fine0
    begin = first * 0
    if PARTS > 1 and GLU == "":
        if first >= rows0:
            packed, absmax, coarse, shift_ptr, fine = packed1, absmax1, coarse1, shift1, fine1
            begin += rows0
        if PARTS > 2:  # noqa: SIM102 - one is known when this is compiled, the other is not
            if first >= rows0 + rows1:
                packed, absmax, coarse, shift_ptr, fine = packed2, absmax2, coarse2, shift2, fine2
                begin += rows1
    if GLU != "":
        packed_too, absmax_too, coarse_too, shift_too, fine_too = packed1, absmax1, coarse1, shift1, fine1
    else:
        packed_too, absmax_too, coarse_too, shift_too, fine_too = packed, absmax, coarse, shift_ptr, fine
    TOO: gl.constexpr = 0 if GLU != "" else SET
    of_pairs_: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, of_scales))
    of_ones_: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, of_scales))
    of_scale = 2 * gl.arange(0, 4, gl.SliceLayout(0, of_pairs_))[None, :, None, None]
    of_scale += gl.arange(0, 2, gl.SliceLayout(0, of_ones_))[None, None, :, None] + (first - begin)
    shift, more_shift = 0.0, 0.0
    if NESTED:
        shift, more_shift = gl.load(shift_ptr), gl.load(shift_too)
    codes = _codes(packed, of_scale, 0, True, WIDTH, of_scales, WARPS)
    codes_too = _codes(packed_too, of_scale + TOO, 0, True, WIDTH, of_scales, WARPS)
    scale, by = _scale_codes(absmax, coarse, of_scale, 0, True, WIDTH, of_scales, WARPS, SIZE2, NESTED)
    scale_too, by_too = _scale_codes(
        absmax_too, coarse_too, of_scale + TOO, 0, True, WIDTH, of_scales, WARPS, SIZE2, NESTED
    )
    MANY: gl.constexpr = WARPS * BLOCKS
    digits = gl.allocate_shared_memory(
        gl.int8, [STEPS, MANY, 2, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )
    totals = gl.allocate_shared_memory(gl.int32, [STEPS, MANY, 2], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    if PDL:
        launch_next()
        wait_for_last()
    by_x = _put(x_ptr, norm_ptr, digits, totals, eps, offset, WIDTH, NORM, WARPS) / ZERO
    # A block's high digits, then its low ones, eight at a time.
    octets = view(
        digits, gl.int64, [STEPS, WARPS, BLOCKS, 2, 8], gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    )
    sums_of_x = view(totals, gl.int32, [STEPS, WARPS, BLOCKS, 2], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, of_scales))))[
        None, None, None, :
    ]
    pair = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, of_scales))))[
        None, :, None, None
    ]
    mine = pair == lane
    # Each lane's own, as far as the compiler knows: what is the same in all of them it keeps elsewhere, and copies it
    # to where a permutation wants it each time (94 of 500 instructions a step).
    table = table_ptr + lane * nothing
    t0, t1, t2, t3 = gl.load(table), gl.load(table + 1), gl.load(table + 2), gl.load(table + 3)
    t4, t5, t6, t7 = gl.load(table + 4), gl.load(table + 5), gl.load(table + 6), gl.load(table + 7)
    for group in range(groups):
        to = first + group * GROUP
        to_too = rows + to if GLU != "" else to + SET
        if RESIDUAL:  # asked for now, added last
            given = _residual(residual_ptr, to, of_scales)
            if GLU == "":
                given_too = _residual(residual_ptr, to_too, of_scales)
        sums = gl.zeros([WARPS, 4, 2, 4], gl.float32, of_scales)
        sums_too = gl.zeros([WARPS, 4, 2, 4], gl.float32, of_scales)
        for step in range(STEPS):
            own_scale = _scale(scale, by, fine, shift, NESTED)
            own_scale_too = _scale(scale_too, by_too, fine_too, more_shift, NESTED)
            now, now_too = codes, codes_too
            # The next codes and scales are on their way while these are multiplied.
            ends = step + 1 == STEPS
            ahead = gl.where(ends, 0, step + 1)
            following = gl.where(ends, group + 1, group)
            more, after = following < groups, following * GROUP
            codes = _codes(packed, of_scale + after, ahead, more, WIDTH, of_scales, WARPS)
            codes_too = _codes(packed_too, of_scale + TOO + after, ahead, more, WIDTH, of_scales, WARPS)
            scale, by = _scale_codes(
                absmax, coarse, of_scale + after, ahead, more, WIDTH, of_scales, WARPS, SIZE2, NESTED
            )
            scale_too, by_too = _scale_codes(
                absmax_too, coarse_too, of_scale + TOO + after, ahead, more, WIDTH, of_scales, WARPS, SIZE2, NESTED
            )  # fmt: skip
            x0, x1, x2, x3, x4, x5, x6, x7 = _lanes_x(octets, step, mine, of_scales, WARPS)
            y, y_low, too, too_low = gl.inline_asm_elementwise(
                _SUMS, _REGISTERS,
                [now[0], now[1], now[2], now[3], now_too[0], now_too[1], now_too[2], now_too[3],
                 x0, x1, x2, x3, x4, x5, x6, x7, t0, t1, t2, t3, t4, t5, t6, t7],
                dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
            )  # fmt: skip
            high, low = _lanes_totals(sums_of_x, step, of_scales, WARPS)
            sums += _whole(y - high, y_low - low) * own_scale
            sums_too += _whole(too - high, too_low - low) * own_scale_too
        y = _finished(sums, by_x, to, bias_ptr, b_ptr, slots_ptr, xa_ptr, outs, end0, end1, BIAS, R, WARPS)
        too = _finished(
            sums_too, by_x, to_too, bias_ptr, b_ptr, slots_ptr, xa_ptr, outs, end0, end1, BIAS, R, WARPS
        )
        own = to + gl.arange(0, SET, y.type.layout)
        if GLU != "":
            y = activated(y, too, GLU)
        if RESIDUAL:
            y += given
        gl.store(out_ptr + own, y.to(out_ptr.dtype.element_ty))
        if GLU == "":
            if RESIDUAL:
                too += given_too
            gl.store(out_ptr + own + SET, too.to(out_ptr.dtype.element_ty))


@gluon.jit
def _whole(high, low):
    """Σ T X · 8191 of the block whose scale a lane has, fp32."""
    return high.to(gl.float32) * 128.0 + low.to(gl.float32)


@cache
def _table(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """V of 16 numbers, int32 [8]: high seven bits of codes 0 to 7, of 8 to 15, then the low ones, four in a word."""
    whole = (torch.tensor(numbers, dtype=torch.float64) * ZERO.value).round().long() + ZERO.value
    return torch.cat((whole >> 7, whole & 127)).to(torch.uint8).view(torch.int32).to(device)


def _kind(parts: Sequence[FourBit], activation: str | None) -> int:
    """Which number of WARPS and the others is meant."""
    return 2 if activation is not None else int(len(parts) > 1)


def fits(x: Tensor, parts: Sequence[FourBit], activation: str | None) -> bool:
    """Whether this kernel takes a row times these weights, and is not the slower one.

    At 8B on an H200, µs here and by `matvec_4bit`: gate and up 28.2, 42.5; q, k and v 9.1, 10.5; o 6.4, 7.5; down
    21.7, 22.0; of the last two here without the residual.
    """
    glu = activation is not None
    set_of = SET.value if glu else 2 * SET.value
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and x.shape[1] % BLOCK.value == 0
        and x.shape[1] <= MOST_COLUMNS
        and (len(parts) == 2 if glu else 1 <= len(parts) <= 3)
        and (len(parts) > 1 or parts[0].rows <= MOST_OUTPUTS)
        and sum(part.rows for part in parts) * x.shape[1] >= LEAST_NUMBERS[_kind(parts, activation)]
        and all(
            part.bits.blocksize == BLOCK.value
            and part.rows % set_of == 0
            and part.numbers == parts[0].numbers
            and max(map(abs, part.numbers)) <= 1
            and part.rows * x.shape[1] < 2**31
            and part.bits.packed.data_ptr() % 8 == 0
            for part in parts
        )
    )


def four_bit_row(
    x: Tensor,
    parts: Sequence[FourBit],
    norm: RowNorm | None,
    bias: Tensor | None,
    share: RowShare | None,
    residual: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    x = unit_rows(x)
    glu, outs = activation is not None, sum(part.rows for part in parts)
    rows = outs // 2 if glu else outs
    out = residual if residual is not None else torch.empty(1, rows, dtype=out_dtype, device=x.device)
    padded = [*parts, *[parts[-1]] * (3 - len(parts))]
    bits = [part.bits for part in padded]
    nested = [part.second for part in bits]
    pointers, (_, end0, end1, _, eps, offset), kinds = arguments(
        x, norm, bias, share, residual, activation, out, outs
    )
    kinds = {name: kinds[name] for name in ("NORM", "BIAS", "RESIDUAL", "GLU", "R")}
    kind, pdl = _kind(parts, activation), dependent_launch(x.device)
    warps, groups = WARPS[kind], GROUPS[kind]
    options = {} if share is None else {"maxnreg": ADAPTED_REGISTERS[kind]}
    _one_row[(triton.cdiv(rows, groups * (SET.value if glu else 2 * SET.value)),)](
        x, *(part.packed.view(-1).view(torch.int64) for part in bits), *(part.absmax for part in bits),
        *(n[1] for n in nested), *(n[2] for n in nested), *(n[0] for n in nested),
        _table(parts[0].numbers, x.device), *pointers[:7], rows, padded[0].rows, padded[1].rows, outs, end0, end1, eps,
        offset, groups, 0, WIDTH=x.shape[1], **kinds, PARTS=len(parts), NESTED=bits[0].nested is not None,
        SIZE2=nested[0][3], WARPS=warps, PDL=bool(pdl), num_warps=warps, **options, **pdl,
    )  # fmt: skip
    return out
