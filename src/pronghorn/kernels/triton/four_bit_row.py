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
weight. A lane has 16 columns of a block of one output of each, in eight bytes of codes; their order of columns is free
as long as x has the same. Every lane has a block's sums of its outputs, and one of four multiplies them by the block's
scale.
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
#: with fewer numbers in all `matvec_4bit` may be as fast, of q, k and v and of gate and up; measured with 25 and 117
#: million
LEAST_NUMBERS = (1 << 24, 1 << 26)
#: of a program, of the same two
WARPS = (8, 4)
#: groups of outputs that a program takes, for which x's digits are made once. Gate and up of 8B, µs on an H200: one
#: 32.1, two 32.5, three 35.6. Without the loop over them the compiler takes 100 registers instead of 72. With more than
#: one, q, k and v would have to end where groups do.
GROUPS = 1
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
    prmt.b32 p, $8, $9, %(one)s; prmt.b32 q, $10, $11, %(other)s; add.s32 h%(to)d, p, q;
    prmt.b32 p, $12, $13, %(one)s; prmt.b32 q, $14, $15, %(other)s; add.s32 l%(to)d, p, q;
"""
_WORD = "xor.b32 other, %s, 0x88888888; %s shr.b32 one, %s, 16; shr.b32 other, other, 16; %s"
_PRODUCT = """
    mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32
        {c0, c1, c2, c3}, {%(of)s0, %(of)s1, %(of)s2, %(of)s3}, {x%(first)d, x%(second)d}, {c0, c1, c2, c3};
"""


def _assembly() -> str:
    """$0 to $3: a block's sums of an output of gate with x's high and low digits, then of up; $4, $5: their codes;
    $6, $7: one digit of x; $8 to $15: the table."""
    lines = [
        "{ .reg .b32 one, other, p, q, first<2>, second<2>, x<4>, h<4>, l<4>, k<8>; .reg .s32 c0, c1, c2, c3;",
        "mov.b64 {first0, first1}, $4; mov.b64 {second0, second1}, $5;",
        "mov.b64 {x0, x1}, $6; mov.b64 {x2, x3}, $7;",
        *(f"mov.s32 c{i}, 0;" for i in range(4)),
    ]
    for half in range(2):
        for at, name in enumerate(("first", "second")):
            word = f"{name}{half}"
            four = [
                _FOUR % {"one": one, "other": "other", "to": 2 * i + at}
                for i, one in enumerate((word, "one"))
            ]
            lines.append(_WORD % (word, four[0], word, four[1]))
        lines.append(_PRODUCT % {"of": "h", "first": 2 * half, "second": 2 * half + 1})
        if half == 0:
            lines += [f"mov.b32 k{i}, l{i};" for i in range(4)]
    lines += [f"shl.b32 c{i}, c{i}, 7;" for i in range(4)]
    lines.append(_PRODUCT % {"of": "k", "first": 0, "second": 1})
    lines.append(_PRODUCT % {"of": "l", "first": 2, "second": 3})
    return "\n".join([*lines, *(f"mov.b32 ${i}, c{i};" for i in range(4)), "}"])


_SUMS = gl.constexpr(_assembly())
_REGISTERS = gl.constexpr(",".join(["=&r"] * 4 + ["l"] * 4 + ["r"] * 8))


@gluon.jit
def _inside(block, width: gl.constexpr, COLUMNS: gl.constexpr):
    """Whether blocks are columns of the weight; all are where steps are whole."""
    if width % COLUMNS == 0:
        return True
    else:
        return block < width // BLOCK


@gluon.jit
def _codes(packed_ptr, row, step, known, width: gl.constexpr, layout: gl.constexpr, WARPS: gl.constexpr):
    """A step's blocks of those rows, eight bytes a lane, [WARPS, BLOCKS, 4, 2, 4]."""
    rest: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, layout)))
    of_lanes: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout)))
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, rest))[:, None, None, None, None]
    block = gl.arange(0, BLOCKS, gl.SliceLayout(0, rest))[None, :, None, None, None]
    lane = gl.arange(0, 4, gl.SliceLayout(0, of_lanes))[None, None, None, None, :]
    block = (step * WARPS + warp) * BLOCKS + block
    known = known & _inside(block, width, WARPS * BLOCKS * BLOCK)
    return gl.load(packed_ptr + row * (width // 16) + block * 4 + lane, mask=known, other=0)


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
def _lanes_x(quads, step, layout: gl.constexpr, WARPS: gl.constexpr):
    """The 16 digits of x that a lane multiplies in each block, eight at a time, [WARPS, BLOCKS, 1, 2, 4] each."""
    whole: gl.constexpr = gl.BlockedLayout(
        [1, BLOCKS, 1, 1, 1, 2], [1, 1, 4, 2, 4, 1], [WARPS, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]
    )
    without_outputs: gl.constexpr = gl.SliceLayout(2, layout)
    first, second = gl.split(quads.index(step).load(gl.SliceLayout(2, whole)))
    return (
        gl.expand_dims(gl.convert_layout(first, without_outputs), 2),
        gl.expand_dims(gl.convert_layout(second, without_outputs), 2),
    )


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
    fine0, fine1, fine2, table_ptr, norm_ptr, bias_ptr, out_ptr, slots_ptr, xa_ptr, b_ptr, rows, rows0, rows1, outs,
    end0, end1, eps, offset, groups, nothing, WIDTH: gl.constexpr, NORM: gl.constexpr, BIAS: gl.constexpr,
    GLU: gl.constexpr, R: gl.constexpr, PARTS: gl.constexpr, NESTED: gl.constexpr, SIZE2: gl.constexpr,
    WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """So many groups of two sets of outputs a program, one after the other. nothing: 0."""
    # Lanes as the matrix units number them: four columns, then eight outputs, which are the columns of x's digits, too.
    layout: gl.constexpr = gl.BlockedLayout(
        [1, BLOCKS, 1, 1, 1], [1, 1, 4, 2, 4], [WARPS, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    of_scales: gl.constexpr = gl.SliceLayout(1, layout)
    COLUMNS: gl.constexpr = WARPS * BLOCKS * BLOCK
    STEPS: gl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    # gate's and up's outputs have the same numbers; of one weight the second set follows the first.
    GROUP: gl.constexpr = SET if GLU != "" else 2 * SET
    first = gl.program_id(0) * (GROUP * groups)
    groups = gl.minimum(groups, (rows - first) // GROUP)
    packed, absmax, coarse, shift_ptr, fine = packed0, absmax0, coarse0, shift0, fine0
    begin = first * 0
    if GLU == "":
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
    of_pairs: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, layout)))
    of_ones: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, layout)))
    row = 2 * gl.arange(0, 4, gl.SliceLayout(0, of_pairs))[None, None, :, None, None]
    row += gl.arange(0, 2, gl.SliceLayout(0, of_ones))[None, None, None, :, None] + (first - begin)
    of_pairs_: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, of_scales))
    of_ones_: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, of_scales))
    of_scale = 2 * gl.arange(0, 4, gl.SliceLayout(0, of_pairs_))[None, :, None, None]
    of_scale += gl.arange(0, 2, gl.SliceLayout(0, of_ones_))[None, None, :, None] + (first - begin)
    shift, more_shift = 0.0, 0.0
    if NESTED:
        shift, more_shift = gl.load(shift_ptr), gl.load(shift_too)
    codes = _codes(packed, row, 0, True, WIDTH, layout, WARPS)
    codes_too = _codes(packed_too, row + TOO, 0, True, WIDTH, layout, WARPS)
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
    by_lane: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    quads = view(digits, gl.int64, [STEPS, WARPS, BLOCKS, 2, 4, 2], by_lane)
    sums_of_x = view(totals, gl.int32, [STEPS, WARPS, BLOCKS, 2], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    block = gl.arange(
        0, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, layout))))
    )
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout)))))
    lane = lane[None, None, None, None, :]
    mine = block[None, :, None, None, None] == lane
    # Each lane's own, as far as the compiler knows: what is the same in all of them it keeps elsewhere, and copies it
    # to where a permutation wants it each time (94 of 500 instructions a step).
    table = table_ptr + lane * nothing
    t0, t1, t2, t3 = gl.load(table), gl.load(table + 1), gl.load(table + 2), gl.load(table + 3)
    t4, t5, t6, t7 = gl.load(table + 4), gl.load(table + 5), gl.load(table + 6), gl.load(table + 7)
    for group in range(groups):
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
            codes = _codes(packed, row + after, ahead, more, WIDTH, layout, WARPS)
            codes_too = _codes(packed_too, row + TOO + after, ahead, more, WIDTH, layout, WARPS)
            scale, by = _scale_codes(
                absmax, coarse, of_scale + after, ahead, more, WIDTH, of_scales, WARPS, SIZE2, NESTED
            )
            scale_too, by_too = _scale_codes(
                absmax_too, coarse_too, of_scale + TOO + after, ahead, more, WIDTH, of_scales, WARPS, SIZE2, NESTED
            )  # fmt: skip
            x0, x1 = _lanes_x(quads, step, layout, WARPS)
            y, y_low, too, too_low = gl.inline_asm_elementwise(
                _SUMS, _REGISTERS, [now, now_too, x0, x1, t0, t1, t2, t3, t4, t5, t6, t7],
                dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
            )  # fmt: skip
            high, low = _lanes_totals(sums_of_x, step, of_scales, WARPS)
            sums += _whole(y, y_low, high, low, mine) * own_scale
            sums_too += _whole(too, too_low, high, low, mine) * own_scale_too
        to = first + group * GROUP
        to_too = rows + to if GLU != "" else to + SET
        y = _finished(sums, by_x, to, bias_ptr, b_ptr, slots_ptr, xa_ptr, outs, end0, end1, BIAS, R, WARPS)
        too = _finished(
            sums_too, by_x, to_too, bias_ptr, b_ptr, slots_ptr, xa_ptr, outs, end0, end1, BIAS, R, WARPS
        )
        own = to + gl.arange(0, SET, y.type.layout)
        if GLU != "":
            gl.store(out_ptr + own, activated(y, too, GLU).to(out_ptr.dtype.element_ty))
        else:
            gl.store(out_ptr + own, y.to(out_ptr.dtype.element_ty))
            gl.store(out_ptr + own + SET, too.to(out_ptr.dtype.element_ty))


@gluon.jit
def _whole(high_sums, low_sums, high, low, mine):
    """Σ T X · 8191 of the block whose scale a lane has, fp32."""
    of_high = gl.sum(gl.where(mine, high_sums, 0), 1) - high
    of_low = gl.sum(gl.where(mine, low_sums, 0), 1) - low
    return of_high.to(gl.float32) * 128.0 + of_low.to(gl.float32)


@cache
def _table(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """V of 16 numbers, int32 [8]: high seven bits of codes 0 to 7, of 8 to 15, then the low ones, four in a word."""
    whole = (torch.tensor(numbers, dtype=torch.float64) * ZERO.value).round().long() + ZERO.value
    return torch.cat((whole >> 7, whole & 127)).to(torch.uint8).view(torch.int32).to(device)


def fits(x: Tensor, parts: Sequence[FourBit], activation: str | None) -> bool:
    """Whether this kernel takes a row times these weights, and is the faster one: gate and up, or q, k and v.

    At 8B on an H200, µs here and by `matvec_4bit`: gate and up 32.1, 42.5; q, k and v 8.8, 10.4; but o 8.4, 7.5; down
    23.2, 21.8.
    """
    glu = activation is not None
    set_of = SET.value if glu else 2 * SET.value
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and x.shape[1] % BLOCK.value == 0
        and (len(parts) == 2 if glu else 2 <= len(parts) <= 3)
        and sum(part.rows for part in parts) * x.shape[1] >= LEAST_NUMBERS[glu]
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
    activation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    x = unit_rows(x)
    glu, outs = activation is not None, sum(part.rows for part in parts)
    rows = outs // 2 if glu else outs
    out = torch.empty(1, rows, dtype=out_dtype, device=x.device)
    padded = [*parts, *[parts[-1]] * (3 - len(parts))]
    bits = [part.bits for part in padded]
    nested = [part.second for part in bits]
    pointers, (_, end0, end1, _, eps, offset), kinds = arguments(
        x, norm, bias, share, None, activation, out, outs
    )
    norm_weight, biases, _, _, slots, xa, b = pointers[:7]
    kinds = {name: kinds[name] for name in ("NORM", "BIAS", "GLU", "R")}
    warps, pdl = WARPS[glu], dependent_launch(x.device)
    _one_row[(triton.cdiv(rows, GROUPS * (SET.value if glu else 2 * SET.value)),)](
        x, *(part.packed.view(-1).view(torch.int64) for part in bits), *(part.absmax for part in bits),
        *(n[1] for n in nested), *(n[2] for n in nested), *(n[0] for n in nested),
        _table(parts[0].numbers, x.device), norm_weight, biases, out, slots, xa, b, rows, padded[0].rows,
        padded[1].rows, outs, end0, end1, eps, offset, GROUPS, 0, WIDTH=x.shape[1], **kinds, PARTS=len(parts),
        NESTED=bits[0].nested is not None, SIZE2=nested[0][3], WARPS=warps, PDL=bool(pdl), num_warps=warps, **pdl,
    )  # fmt: skip
    return out
