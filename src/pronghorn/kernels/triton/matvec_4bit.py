"""4-bit weights times one row in Triton, the codes read as they lie: half a byte a weight.

A 32-bit word holds eight weights. On a GPU they are looked up in registers by byte permutation (`_DOT`), in a table of
fp16, whose rounding (2⁻¹², once a code) is far below that of a weight dequantised to bf16. A thread takes four words of
each of a program's outputs, which share what it has of x; what the words of a block give is summed before its scale
multiplies it, so that scales are loaded once a block.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.matvec import FourBit, RowAdapter, RowNorm, RowShare
from pronghorn.kernels.triton.glu import value_and_slope
from pronghorn.kernels.triton.launch import dependent_launch, launch_next, unit_rows, wait_for_last
from pronghorn.kernels.triton.matvec import (
    a_block,
    arguments,
    awaited_share,
    hand_on_xa,
    handed_words,
    own_b,
    share_of,
)

# Of a half word's four codes the low bytes of their fp16 numbers, then the high ones: each out of two registers of
# codes 0 to 7 and two of codes 8 to 15, and between the two by the code's highest bit. Value 2i of a word is the high
# half of byte i, so that the halves come out swapped.
_HALF = """
    prmt.b32 a, $10, $11, index;
    prmt.b32 b, $12, $13, index;
    prmt.b32 low, a, b, upper;
    prmt.b32 a, $14, $15, index;
    prmt.b32 b, $16, $17, index;
    prmt.b32 high, a, b, upper;
    prmt.b32 a, low, high, 0x5140;
    prmt.b32 b, low, high, 0x7362;
    mov.b32 {first, second}, a;
    cvt.f32.f16 v, second;
    fma.rn.f32 %(sum)s, v, $%(x0)d, %(sum)s;
    cvt.f32.f16 v, first;
    fma.rn.f32 %(sum)s, v, $%(x1)d, %(sum)s;
    mov.b32 {first, second}, b;
    cvt.f32.f16 v, second;
    fma.rn.f32 %(sum)s, v, $%(x2)d, %(sum)s;
    cvt.f32.f16 v, first;
    fma.rn.f32 %(sum)s, v, $%(x3)d, %(sum)s;
"""
# Two sums, so that a multiplication need not wait for the one before it. Permutations read the low half of a selector.
_DOT = tl.constexpr(
    "{ .reg .b32 index, upper, a, b, low, high; .reg .b16 first, second; .reg .f32 v, s, t;\n"
    + "mov.f32 s, 0f00000000; mov.f32 t, 0f00000000; and.b32 index, $1, 0x77777777;"
    + "shr.b32 upper, $1, 1; and.b32 upper, upper, 0x44444444; or.b32 upper, upper, 0x32103210;"
    + _HALF % {"sum": "s", "x0": 2, "x1": 3, "x2": 4, "x3": 5}
    + "shr.b32 index, index, 16; shr.b32 upper, upper, 16;"
    + _HALF % {"sum": "t", "x0": 6, "x1": 7, "x2": 8, "x3": 9}
    + "add.f32 $0, s, t; }"
)
_DOT_REGISTERS = tl.constexpr(",".join(["=f", "r"] + ["f"] * 8 + ["r"] * 8))


@triton.jit
def _dots(
    packed, x0, x1, x2, x3, x4, x5, x6, x7, code_ptr, l0, l1, l2, l3, h0, h1, h2, h3, TABLE: tl.constexpr
):  # fmt: skip
    """Σ over a word's eight numbers of number · x, before the scale, fp32 [ROWS, WORDS]."""
    if TABLE:
        return tl.inline_asm_elementwise(
            _DOT, _DOT_REGISTERS,
            [packed, x0, x1, x2, x3, x4, x5, x6, x7, l0, l1, l2, l3, h0, h1, h2, h3],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return (
            tl.load(code_ptr + ((packed >> 4) & 15)) * x0
            + tl.load(code_ptr + (packed & 15)) * x1
            + tl.load(code_ptr + ((packed >> 12) & 15)) * x2
            + tl.load(code_ptr + ((packed >> 8) & 15)) * x3
            + tl.load(code_ptr + ((packed >> 20) & 15)) * x4
            + tl.load(code_ptr + ((packed >> 16) & 15)) * x5
            + tl.load(code_ptr + ((packed >> 28) & 15)) * x6
            + tl.load(code_ptr + ((packed >> 24) & 15)) * x7
        )


@triton.jit
def _scales(absmax_ptr, fine_ptr, coarse_ptr, shift, block, known, SIZE2: tl.constexpr, NESTED: tl.constexpr):
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=known, other=0).to(tl.int32)
        return tl.load(fine_ptr + code) * tl.load(coarse_ptr + block // SIZE2, mask=known, other=0.0) + shift
    else:
        return tl.load(absmax_ptr + block, mask=known, other=0.0)


@triton.jit
def _pair(ptr, at, i: tl.constexpr, known, PAIRS: tl.constexpr):
    """Numbers 2i and 2i + 1 of the words `at`, fp32. PAIRS: two of bf16 are read as one of int32."""
    if PAIRS:
        both = tl.load(ptr + at * 4 + i, mask=known, other=0)
        return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
    else:
        first = tl.load(ptr + at * 8 + 2 * i, mask=known, other=0.0).to(tl.float32)
        return first, tl.load(ptr + at * 8 + 2 * i + 1, mask=known, other=0.0).to(tl.float32)


@triton.jit
def _scaled_pair(
    x_ptr, norm_ptr, at, i: tl.constexpr, known, offset, square, NORM: tl.constexpr, PAIRS: tl.constexpr
):  # fmt: skip
    """Two of x times the norm's weight, and the sum of squares with theirs."""
    a, b = _pair(x_ptr, at, i, known, PAIRS)
    if NORM:
        square += a * a + b * b
        v, w = _pair(norm_ptr, at, i, known, PAIRS)
        a, b = a * (v + offset), b * (w + offset)
    return a, b, square


@triton.jit
def _codes(packed_ptr, own, words, word, start, WHOLE: tl.constexpr):
    """The words of some rows [ROWS, WORDS] from `start` on; zero beyond a row's end."""
    at = packed_ptr + own[:, None] * words + start + word[None, :]
    if WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=(word < words - start)[None, :], other=0)


@triton.jit
def _block_scales(
    absmax_ptr, fine_ptr, coarse_ptr, shift, own, blocks, block, start, SIZE2: tl.constexpr, NESTED: tl.constexpr
):  # fmt: skip
    """Of the same rows, [ROWS, BLOCKS]."""
    at = own[:, None] * blocks + start + block[None, :]
    return _scales(
        absmax_ptr, fine_ptr, coarse_ptr, shift, at, (block < blocks - start)[None, :], SIZE2, NESTED
    )


@triton.jit
def _one_row(
    x_ptr, x16_ptr, norm16_ptr, code_ptr, l0, l1, l2, l3, h0, h1, h2, h3,
    packed0, packed1, packed2, absmax0, absmax1, absmax2,
    coarse0, coarse1, coarse2, shift0, shift1, shift2, fine0, fine1, fine2,
    norm_ptr, bias_ptr, residual_ptr, out_ptr, slots_ptr, xa_ptr, b_ptr, a_ptr, turn_ptr,
    rows, rows0, rows1, words, outs, end0, end1, parts_rank, eps, offset,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GLU: tl.constexpr, R: tl.constexpr,
    INSIDE: tl.constexpr, COPIES: tl.constexpr, PARTS: tl.constexpr, NESTED: tl.constexpr, SIZE: tl.constexpr,
    SIZE2: tl.constexpr, TABLE: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, WHOLE: tl.constexpr,
    PAIRS: tl.constexpr, A_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """INSIDE: so many programs in front of the others multiply by A."""
    program = tl.program_id(0)
    if INSIDE > 0:
        turn = tl.load(turn_ptr)
        if program < INSIDE:
            hand_on_xa(
                program, x16_ptr, a_ptr, norm16_ptr, slots_ptr, xa_ptr, turn, words * 8, eps, offset, INSIDE,
                COPIES, NORM, A_BLOCK, PDL,
            )  # fmt: skip
        else:
            _outputs(
                program - INSIDE, turn,
                x_ptr, code_ptr, l0, l1, l2, l3, h0, h1, h2, h3, packed0, packed1, packed2, absmax0, absmax1, absmax2,
                coarse0, coarse1, coarse2, shift0, shift1, shift2, fine0, fine1, fine2,
                norm_ptr, bias_ptr, residual_ptr, out_ptr, slots_ptr,
                xa_ptr + program % COPIES * INSIDE, b_ptr,
                rows, rows0, rows1, words, outs, end0, end1, parts_rank, eps, offset,
                NORM, BIAS, RESIDUAL, GLU, R, True, PARTS, NESTED, SIZE, SIZE2, TABLE, ROWS, WORDS, WHOLE, PAIRS, PDL,
            )  # fmt: skip
    else:
        _outputs(
            program, 0,
            x_ptr, code_ptr, l0, l1, l2, l3, h0, h1, h2, h3, packed0, packed1, packed2, absmax0, absmax1, absmax2,
            coarse0, coarse1, coarse2, shift0, shift1, shift2, fine0, fine1, fine2,
            norm_ptr, bias_ptr, residual_ptr, out_ptr, slots_ptr, xa_ptr, b_ptr,
            rows, rows0, rows1, words, outs, end0, end1, parts_rank, eps, offset,
            NORM, BIAS, RESIDUAL, GLU, R, False, PARTS, NESTED, SIZE, SIZE2, TABLE, ROWS, WORDS, WHOLE, PAIRS, PDL,
        )  # fmt: skip


@triton.jit
def _outputs(
    program, turn,
    x_ptr, code_ptr, l0, l1, l2, l3, h0, h1, h2, h3, packed0, packed1, packed2, absmax0, absmax1, absmax2,
    coarse0, coarse1, coarse2, shift0, shift1, shift2, fine0, fine1, fine2,
    norm_ptr, bias_ptr, residual_ptr, out_ptr, slots_ptr, xa_ptr, b_ptr,
    rows, rows0, rows1, words, outs, end0, end1, parts_rank, eps, offset,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GLU: tl.constexpr, R: tl.constexpr,
    AWAITED: tl.constexpr, PARTS: tl.constexpr, NESTED: tl.constexpr, SIZE: tl.constexpr, SIZE2: tl.constexpr,
    TABLE: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, WHOLE: tl.constexpr, PAIRS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Some outputs of a program that multiplies by the weight."""
    first = program * ROWS
    row = first + tl.arange(0, ROWS)
    known = row < rows
    packed_ptr, absmax_ptr, coarse_ptr, shift_ptr, fine_ptr = packed0, absmax0, coarse0, shift0, fine0
    begin = first * 0
    if PARTS > 1 and GLU == "":
        if first >= rows0:
            packed_ptr, absmax_ptr, coarse_ptr, shift_ptr, fine_ptr = packed1, absmax1, coarse1, shift1, fine1
            begin += rows0
        if PARTS > 2:  # noqa: SIM102  (one is known at compile time, the other is not)
            if first >= rows0 + rows1:
                packed_ptr, absmax_ptr, coarse_ptr = packed2, absmax2, coarse2
                shift_ptr, fine_ptr = shift2, fine2
                begin += rows1
    shift, shift_up = 0.0, 0.0
    if NESTED:
        shift = tl.load(shift_ptr)
        if GLU != "":
            shift_up = tl.load(shift1)
    # In words, as the launcher gives it, the width is known to keep loads of four words aligned.
    per_block: tl.constexpr = SIZE // 8
    BLOCKS: tl.constexpr = WORDS // per_block
    width, blocks = words * 8, words // per_block
    own = (row - begin).to(tl.int64)
    word, block = tl.arange(0, WORDS), tl.arange(0, BLOCKS)
    packed = _codes(packed_ptr, own, words, word, 0, WHOLE)
    scale = _block_scales(absmax_ptr, fine_ptr, coarse_ptr, shift, own, blocks, block, 0, SIZE2, NESTED)
    if GLU != "":
        packed_up = _codes(packed1, own, words, word, 0, WHOLE)
        scale_up = _block_scales(absmax1, fine1, coarse1, shift_up, own, blocks, block, 0, SIZE2, NESTED)
    if R > 0:
        b = own_b(b_ptr, slots_ptr, 0, row, known, outs, R)
        if GLU != "":
            b_up = own_b(b_ptr, slots_ptr, 0, rows + row, known, outs, R)
    if PDL:
        launch_next()
        wait_for_last()
    if AWAITED:
        # Programs that begin late find them here, and need not wait for memory in the end.
        handed = handed_words(xa_ptr, row, known, end0, end1, R)
        if GLU != "":
            handed_up = handed_words(xa_ptr, rows + row, known, end0, end1, R)
    sums = tl.zeros([ROWS, BLOCKS], tl.float32)
    sums_up = tl.zeros([ROWS, BLOCKS], tl.float32)
    square = tl.zeros([WORDS], tl.float32)
    for start in range(0, words, WORDS):
        inside = word < words - start
        at = start + word
        x0, x1, square = _scaled_pair(x_ptr, norm_ptr, at, 0, inside, offset, square, NORM, PAIRS)
        x2, x3, square = _scaled_pair(x_ptr, norm_ptr, at, 1, inside, offset, square, NORM, PAIRS)
        x4, x5, square = _scaled_pair(x_ptr, norm_ptr, at, 2, inside, offset, square, NORM, PAIRS)
        x6, x7, square = _scaled_pair(x_ptr, norm_ptr, at, 3, inside, offset, square, NORM, PAIRS)
        dots = _dots(
            packed, x0[None, :], x1[None, :], x2[None, :], x3[None, :], x4[None, :], x5[None, :], x6[None, :],
            x7[None, :], code_ptr, l0, l1, l2, l3, h0, h1, h2, h3, TABLE,
        )  # fmt: skip
        # The next words and scales are on their way while these are summed up.
        packed = _codes(packed_ptr, own, words, word, start + WORDS, False)
        sums += tl.sum(tl.reshape(dots, [ROWS, BLOCKS, per_block]), 2) * scale
        ahead = start // per_block + BLOCKS
        scale = _block_scales(
            absmax_ptr, fine_ptr, coarse_ptr, shift, own, blocks, block, ahead, SIZE2, NESTED
        )
        if GLU != "":
            dots = _dots(
                packed_up, x0[None, :], x1[None, :], x2[None, :], x3[None, :], x4[None, :], x5[None, :],
                x6[None, :], x7[None, :], code_ptr, l0, l1, l2, l3, h0, h1, h2, h3, TABLE,
            )  # fmt: skip
            packed_up = _codes(packed1, own, words, word, start + WORDS, False)
            sums_up += tl.sum(tl.reshape(dots, [ROWS, BLOCKS, per_block]), 2) * scale_up
            scale_up = _block_scales(
                absmax1, fine1, coarse1, shift_up, own, blocks, block, ahead, SIZE2, NESTED
            )
    rstd = 1.0
    if NORM:
        rstd = 1.0 / tl.sqrt(tl.sum(square, 0) / width + eps)
    y = tl.sum(sums, 1) * rstd
    up = tl.sum(sums_up, 1) * rstd
    if BIAS:
        y += tl.load(bias_ptr + row, mask=known, other=0.0).to(tl.float32)
        if GLU != "":
            up += tl.load(bias_ptr + rows + row, mask=known, other=0.0).to(tl.float32)
    if R > 0:
        if AWAITED:
            y += awaited_share(b, handed, xa_ptr, turn, row, known, end0, end1, R)
        else:
            y += share_of(b, xa_ptr, 0, row, known, end0, end1, parts_rank, R)
        if GLU != "":
            if AWAITED:
                up += awaited_share(b_up, handed_up, xa_ptr, turn, rows + row, known, end0, end1, R)
            else:
                up += share_of(b_up, xa_ptr, 0, rows + row, known, end0, end1, parts_rank, R)
    if GLU != "":
        value, _ = value_and_slope(y, GLU)
        y = value * up
    if RESIDUAL:
        y += tl.load(residual_ptr + row, mask=known, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, y.to(out_ptr.dtype.element_ty), mask=known)


def one_row_config(rows: int, width: int, glu: bool, blocksize: int) -> dict[str, int]:
    """Outputs and words of a tile, measured on an H200 for 8B and 1.5B.

    More outputs share what a thread has of x, but each wants its registers, and looking up takes many threads to keep
    going: held to 128 registers, gate and up of 8B take 44 µs instead of 49.
    """
    if rows <= 2048 and not glu:
        config = (2, 256, 1) if width <= 4096 else (4, 512, 4)
    elif glu or width > 4096:
        config = (4, 256, 2)
    else:
        config = (8, 256, 2) if rows > 4096 else (16, 512, 4)
    outputs, words, warps = config
    options = {"maxnreg": 128} if config == (4, 256, 2) else {}
    return {"ROWS": outputs, "WORDS": max(words, blocksize // 8), "num_warps": warps, **options}


@cache
def table_words(code: tuple[float, ...]) -> tuple[int, ...]:
    """A table of 16 numbers as fp16 in eight registers: the low bytes of four each, then the high bytes."""
    raw = [struct.pack("<e", number) for number in code]
    planes = [bytes(number[i] for number in raw) for i in (0, 1)]
    return tuple(struct.unpack("<i", plane[k : k + 4])[0] for plane in planes for k in range(0, 16, 4))


def four_bit(
    x: Tensor,
    parts: Sequence[FourBit],
    norm: RowNorm | None,
    bias: Tensor | None,
    share: RowShare | RowAdapter | None,
    residual: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    x = unit_rows(x)
    batch, width = x.shape
    if batch != 1 or len(parts) > 3:
        raise ValueError(f"{batch} rows, {len(parts)} weights")
    outs = sum(part.rows for part in parts)
    rows = outs // 2 if activation is not None else outs
    out = residual if residual is not None else torch.empty(1, rows, dtype=out_dtype, device=x.device)
    pointers, numbers, kinds = arguments(x, norm, bias, share, residual, activation, out, outs)
    padded = [*parts, *[parts[-1]] * (3 - len(parts))]
    bits = [part.bits for part in padded]
    nested = [part.second for part in bits]
    config = one_row_config(rows, width, activation is not None, bits[0].blocksize)
    # All of a program's outputs are of one weight.
    while any(part.rows % config["ROWS"] for part in parts):
        config["ROWS"] //= 2
    pdl = dependent_launch(x.device)
    pairs = all(tensor.dtype == torch.bfloat16 and tensor.data_ptr() % 4 == 0 for tensor in (x, pointers[0]))
    wide_x, wide_norm = x, pointers[0]
    if pairs:
        x, pointers = x.view(torch.int32), (pointers[0].view(torch.int32), *pointers[1:])
    _one_row[(kinds["INSIDE"] + triton.cdiv(rows, config["ROWS"]),)](
        x, wide_x, wide_norm, bits[0].code, *table_words(parts[0].numbers),
        *(part.packed.view(-1).view(torch.int32) for part in bits), *(part.absmax for part in bits),
        *(n[1] for n in nested), *(n[2] for n in nested), *(n[0] for n in nested),
        *pointers, rows, padded[0].rows, padded[1].rows, width // 8, *numbers, **kinds,
        PARTS=len(parts), NESTED=bits[0].nested is not None, SIZE=bits[0].blocksize, SIZE2=nested[0][3],
        TABLE=x.is_cuda, WHOLE=width % (8 * config["WORDS"]) == 0, PAIRS=pairs,
        A_BLOCK=a_block(width, config["num_warps"]), PDL=bool(pdl), **config, **pdl,
    )  # fmt: skip
    return out
