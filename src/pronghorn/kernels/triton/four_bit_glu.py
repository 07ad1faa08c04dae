"""gate and up in 4 bits times one row on the matrix units, written in Gluon (Triton's language of explicit layouts).

The matrix units multiply two sets of eight outputs at a time: gate and up of the same eight. A lane has 16 columns of a
block of 64 of one output of each, in eight bytes of codes, which it looks up in registers as in `skinny`; where they
stand in the lane is where the matrix units want them, whose order of columns is free as long as x has the same. The
right side of the product is x in all of its eight columns. So every lane has a block's sums of its outputs, and one of
four multiplies them by the block's scale.

On an H200 gate and up of 8B take 34 µs where `matvec_4bit` takes 44: a word of eight codes costs 28 instructions
instead of 39, none of them a conversion or a multiplication. Weights of fewer outputs take longer here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pronghorn.kernels.matvec import FourBit, RowNorm
from pronghorn.kernels.triton.gluon_parts import activated, barrier, launch_next, view, wait_for_last
from pronghorn.kernels.triton.launch import dependent_launch, unit_rows

#: columns of a block of weights, and of what a warp takes at a time
BLOCK = gl.constexpr(64)
BLOCKS = gl.constexpr(4)
WARPS = 4
#: with fewer numbers in a weight `matvec_4bit` may be as fast; measured with 59 million
LEAST_NUMBERS = 1 << 25

# A word's eight codes as four words of two numbers in bf16, in the order of the columns. Of four codes the low bytes of
# their numbers, then the high ones: each out of two registers of codes 0 to 7 and two of codes 8 to 15, and between the
# two by the code's highest bit (permutations read the low half of a selector). Column 2i is the high half of byte i.
_FOUR = """
    prmt.b32 p, $8, $9, index; prmt.b32 q, $10, $11, index; prmt.b32 low, p, q, upper;
    prmt.b32 p, $12, $13, index; prmt.b32 q, $14, $15, index; prmt.b32 high, p, q, upper;
    prmt.b32 %s, low, high, 0x4051; prmt.b32 %s, low, high, 0x6273;
"""
_WORD = (
    "and.b32 index, %s, 0x77777777; shr.b32 upper, %s, 1;"
    "lop3.b32 upper, upper, 0x44444444, 0x32103210, 0xEA;"
    "%s shr.b32 index, index, 16; shr.b32 upper, upper, 16; %s"
)
_PRODUCT = """
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {c0, c1, c2, c3}, {a%d, b%d, a%d, b%d}, {x%d, x%d}, {c0, c1, c2, c3};
"""


def _assembly() -> str:
    """$0, $1: a block's sums of an output of gate and of up; $2, $3: their codes; $4 to $7: x; $8 to $15: the table."""
    lines = [
        "{ .reg .b32 index, upper, p, q, low, high, first<2>, second<2>, a<4>, b<4>, x<8>;",
        ".reg .f32 c0, c1, c2, c3;",
        "mov.b64 {first0, first1}, $2; mov.b64 {second0, second1}, $3;",
        *(f"mov.b64 {{x{2 * i}, x{2 * i + 1}}}, ${4 + i};" for i in range(4)),
        *(f"mov.f32 c{i}, 0f00000000;" for i in range(4)),
    ]
    for half in range(2):
        for name, to in (("first", "a"), ("second", "b")):
            word = f"{name}{half}"
            lines.append(_WORD % (word, word, _FOUR % (f"{to}0", f"{to}1"), _FOUR % (f"{to}2", f"{to}3")))
        for i in (0, 2):
            lines.append(_PRODUCT % (i, i, i + 1, i + 1, 4 * half + i, 4 * half + i + 1))
    return "\n".join([*lines, "mov.f32 $0, c0; mov.f32 $1, c2; }"])


_SUMS = gl.constexpr(_assembly())
_REGISTERS = gl.constexpr(",".join(["=&f"] * 2 + ["l"] * 6 + ["r"] * 8))


@gluon.jit
def _codes(packed_ptr, row, step, known, width: gl.constexpr, layout: gl.constexpr, WARPS: gl.constexpr):
    """A step's blocks of those rows, eight bytes a lane, [WARPS, BLOCKS, 8, 4]."""
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout))))
    block = gl.arange(0, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout))))
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    number = (step * WARPS + warp[:, None, None, None]) * BLOCKS + block[None, :, None, None]
    at = row * (width // 16) + number * 4 + lane[None, None, None, :]
    return gl.load(packed_ptr + at, mask=known, other=0)


@gluon.jit
def _scale_codes(
    absmax_ptr, coarse_ptr, row, step, known, width: gl.constexpr, layout: gl.constexpr, WARPS: gl.constexpr,
    SIZE2: gl.constexpr, NESTED: gl.constexpr,
):  # fmt: skip
    """What the scales of the same blocks are made of, one of four blocks a lane, [WARPS, 8, 4]."""
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    lane = gl.arange(0, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    at = row * (width // BLOCK) + (step * WARPS + warp) * BLOCKS + lane
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
def _put(x_ptr, norm_ptr, xs, eps, offset, WIDTH: gl.constexpr, NORM: gl.constexpr, WARPS: gl.constexpr):
    """x, times the norm's weight where there is one, into shared memory; 1 / rms(x)."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    COLUMNS: gl.constexpr = WARPS * BLOCKS * BLOCK
    column = gl.arange(0, COLUMNS, layout)
    square = gl.zeros([COLUMNS], gl.float32, layout)
    for i in gl.static_range(WIDTH // COLUMNS):
        x = gl.load(x_ptr + i * COLUMNS + column)
        if NORM:
            wide = x.to(gl.float32)
            square += wide * wide
            x = (wide * (gl.load(norm_ptr + i * COLUMNS + column).to(gl.float32) + offset)).to(gl.bfloat16)
        xs.index(i).store(x)
    barrier()
    rstd = 1.0
    if NORM:
        rstd = 1.0 / gl.sqrt(gl.sum(square, 0) / WIDTH + eps)
    return rstd


@gluon.jit
def _lanes_x(quads, step, layout: gl.constexpr, WARPS: gl.constexpr):
    """The 16 numbers of x that a lane multiplies in each block, four at a time, [WARPS, BLOCKS, 1, 4] each."""
    whole: gl.constexpr = gl.BlockedLayout(
        [1, BLOCKS, 1, 1, 4], [1, 1, 8, 4, 1], [WARPS, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    without_outputs: gl.constexpr = gl.SliceLayout(2, layout)
    x = quads.index(step).load(gl.SliceLayout(2, whole))
    even, odd = gl.split(gl.reshape(x, [WARPS, BLOCKS, 4, 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return (
        gl.expand_dims(gl.convert_layout(first, without_outputs), 2),
        gl.expand_dims(gl.convert_layout(second, without_outputs), 2),
        gl.expand_dims(gl.convert_layout(third, without_outputs), 2),
        gl.expand_dims(gl.convert_layout(fourth, without_outputs), 2),
    )


@gluon.jit
def _gate_up(
    x_ptr, packed, packed_up, absmax, absmax_up, coarse, coarse_up, shift_ptr, shift_up_ptr, fine, fine_up,
    table_ptr, norm_ptr, bias_ptr, out_ptr, rows, eps, offset, WIDTH: gl.constexpr, NORM: gl.constexpr,
    BIAS: gl.constexpr, KIND: gl.constexpr, NESTED: gl.constexpr, SIZE2: gl.constexpr, WARPS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """act of eight outputs a program."""
    # Lanes as the matrix units number them: four columns, then eight outputs.
    layout: gl.constexpr = gl.BlockedLayout([1, BLOCKS, 1, 1], [1, 1, 8, 4], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    of_scales: gl.constexpr = gl.SliceLayout(1, layout)
    COLUMNS: gl.constexpr = WARPS * BLOCKS * BLOCK
    STEPS: gl.constexpr = WIDTH // COLUMNS
    first = gl.program_id(0) * 8
    row = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))
    row = row[None, None, :, None] + first
    of_scale = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, of_scales)))[None, :, None] + first
    shift, shift_up = 0.0, 0.0
    if NESTED:
        shift, shift_up = gl.load(shift_ptr), gl.load(shift_up_ptr)
    codes = _codes(packed, row, 0, True, WIDTH, layout, WARPS)
    codes_up = _codes(packed_up, row, 0, True, WIDTH, layout, WARPS)
    scale, by = _scale_codes(absmax, coarse, of_scale, 0, True, WIDTH, of_scales, WARPS, SIZE2, NESTED)
    scale_up, by_up = _scale_codes(
        absmax_up, coarse_up, of_scale, 0, True, WIDTH, of_scales, WARPS, SIZE2, NESTED
    )
    t0, t1, t2, t3 = (
        gl.load(table_ptr),
        gl.load(table_ptr + 1),
        gl.load(table_ptr + 2),
        gl.load(table_ptr + 3),
    )
    t4, t5, t6, t7 = (
        gl.load(table_ptr + 4),
        gl.load(table_ptr + 5),
        gl.load(table_ptr + 6),
        gl.load(table_ptr + 7),
    )
    xs = gl.allocate_shared_memory(gl.bfloat16, [STEPS, COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if PDL:
        launch_next()
        wait_for_last()
    rstd = _put(x_ptr, norm_ptr, xs, eps, offset, WIDTH, NORM, WARPS)
    by_lane: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    quads = view(xs, gl.int64, [STEPS, WARPS, BLOCKS, 4, 4], by_lane)
    block = gl.arange(0, BLOCKS, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout))))
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    mine = block[None, :, None, None] == lane[None, None, None, :]
    sums = gl.zeros([WARPS, 8, 4], gl.float32, of_scales)
    sums_up = gl.zeros([WARPS, 8, 4], gl.float32, of_scales)
    for step in range(STEPS):
        own_scale = _scale(scale, by, fine, shift, NESTED)
        own_scale_up = _scale(scale_up, by_up, fine_up, shift_up, NESTED)
        now, now_up = codes, codes_up
        # The next codes and scales are on their way while these are multiplied.
        more = step + 1 < STEPS
        codes = _codes(packed, row, step + 1, more, WIDTH, layout, WARPS)
        codes_up = _codes(packed_up, row, step + 1, more, WIDTH, layout, WARPS)
        scale, by = _scale_codes(
            absmax, coarse, of_scale, step + 1, more, WIDTH, of_scales, WARPS, SIZE2, NESTED
        )
        scale_up, by_up = _scale_codes(
            absmax_up, coarse_up, of_scale, step + 1, more, WIDTH, of_scales, WARPS, SIZE2, NESTED
        )
        x0, x1, x2, x3 = _lanes_x(quads, step, layout, WARPS)
        y, up = gl.inline_asm_elementwise(
            _SUMS, _REGISTERS, [now, now_up, x0, x1, x2, x3, t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(gl.float32, gl.float32), is_pure=False, pack=1,
        )  # fmt: skip
        sums += gl.sum(gl.where(mine, y, 0.0), 1) * own_scale
        sums_up += gl.sum(gl.where(mine, up, 0.0), 1) * own_scale_up
    gate = gl.sum(gl.sum(sums, 2), 0) * rstd
    of_up = gl.sum(gl.sum(sums_up, 2), 0) * rstd
    to = first + gl.arange(0, 8, gate.type.layout)
    if BIAS:
        gate += gl.load(bias_ptr + to).to(gl.float32)
        of_up += gl.load(bias_ptr + rows + to).to(gl.float32)
    gl.store(out_ptr + to, activated(gate, of_up, KIND).to(out_ptr.dtype.element_ty))


@cache
def _table(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """A table of 16 numbers as bf16 in eight words: the low bytes of four each, then the high bytes."""
    planes = torch.tensor(numbers).bfloat16().view(torch.uint8).view(16, 2).t()
    return planes.contiguous().view(-1).view(torch.int32).to(device)


def fits_glu(x: Tensor, parts: Sequence[FourBit]) -> bool:
    """Whether this kernel takes gate and up, and is the faster one: whole steps of columns, and many outputs."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and x.shape[1] % (WARPS * BLOCKS.value * BLOCK.value) == 0
        and len(parts) == 2
        and all(
            part.bits.blocksize == BLOCK.value
            and part.rows % 8 == 0
            and LEAST_NUMBERS <= part.rows * x.shape[1] < 2**31
            and part.bits.packed.data_ptr() % 8 == 0
            for part in parts
        )
    )


def four_bit_glu(
    x: Tensor,
    parts: Sequence[FourBit],
    norm: RowNorm | None,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    x = unit_rows(x)
    rows = parts[0].rows
    out = torch.empty(1, rows, dtype=out_dtype, device=x.device)
    bits = [part.bits for part in parts]
    nested = [part.second for part in bits]
    eps, offset = (0.0, 0.0) if norm is None else (norm.eps, norm.offset)
    pdl = dependent_launch(x.device)
    _gate_up[(rows // 8,)](
        x, *(part.packed.view(-1).view(torch.int64) for part in bits), *(part.absmax for part in bits),
        *(n[1] for n in nested), *(n[2] for n in nested), *(n[0] for n in nested),
        _table(parts[0].numbers, x.device), x if norm is None else norm.weight, x if bias is None else bias,
        out, rows, eps, offset, WIDTH=x.shape[1], NORM=norm is not None, BIAS=bias is not None, KIND=activation,
        NESTED=bits[0].nested is not None, SIZE2=nested[0][3], WARPS=WARPS, PDL=bool(pdl), num_warps=WARPS, **pdl,
    )  # fmt: skip
    return out
