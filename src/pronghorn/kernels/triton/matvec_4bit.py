"""4-bit weights times few rows in Triton, the codes read as they lie: half a byte a weight.

A 32-bit word holds eight weights. On a GPU they are looked up in registers by byte permutation (`_values`), in a table
of fp16, whose rounding (2⁻¹², once a code) is far below that of a weight dequantised to bf16. One row: a thread takes
four words of a row and eight outputs share what it has of x. Up to 16 rows: weights and rows meet on the matrix units,
the j-th weights of all words at a time, so that nothing has to be put in order.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.matvec import MOST_ROWS, FourBit, RowNorm, RowShare
from pronghorn.kernels.triton.glu import value_and_slope
from pronghorn.kernels.triton.launch import dependent_launch, launch_next, unit_rows, wait_for_last
from pronghorn.kernels.triton.lora import dot, is_wide
from pronghorn.kernels.triton.matvec import PADDED_ROWS, arguments, own_share

# Of a half word's four codes the low bytes of their fp16 numbers, then the high ones: each out of two registers of
# codes 0 to 7 and two of codes 8 to 15, and between the two by the code's highest bit. Value 2i of a word is the high
# half of byte i, so that the halves come out swapped.
_HALF = """
    and.b32 index, half, 0x7777;
    and.b32 upper, half, 0x8888;
    shr.b32 upper, upper, 1;
    or.b32 upper, upper, 0x3210;
    prmt.b32 a, $9, $10, index;
    prmt.b32 b, $11, $12, index;
    prmt.b32 low, a, b, upper;
    prmt.b32 a, $13, $14, index;
    prmt.b32 b, $15, $16, index;
    prmt.b32 high, a, b, upper;
    prmt.b32 a, low, high, 0x5140;
    prmt.b32 b, low, high, 0x7362;
    mov.b32 {first, second}, a;
    cvt.f32.f16 $%d, second;
    cvt.f32.f16 $%d, first;
    mov.b32 {first, second}, b;
    cvt.f32.f16 $%d, second;
    cvt.f32.f16 $%d, first;
"""
_LOOK_UP = tl.constexpr(
    "{ .reg .b32 half, index, upper, a, b, low, high; .reg .b16 first, second;\n"
    + "mov.b32 half, $8;" + _HALF % (0, 1, 2, 3) + "shr.b32 half, $8, 16;" + _HALF % (4, 5, 6, 7) + "}"
)  # fmt: skip
_REGISTERS = tl.constexpr(",".join(["=f"] * 8 + ["r"] * 9))


@triton.jit
def _values(packed, code_ptr, l0, l1, l2, l3, h0, h1, h2, h3, TABLE: tl.constexpr):
    """The eight numbers of each word, before the scale, fp32. TABLE: by permutation; else looked up in memory."""
    if TABLE:
        return tl.inline_asm_elementwise(
            _LOOK_UP, _REGISTERS, [packed, l0, l1, l2, l3, h0, h1, h2, h3],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return (
            tl.load(code_ptr + ((packed >> 4) & 15)),
            tl.load(code_ptr + (packed & 15)),
            tl.load(code_ptr + ((packed >> 12) & 15)),
            tl.load(code_ptr + ((packed >> 8) & 15)),
            tl.load(code_ptr + ((packed >> 20) & 15)),
            tl.load(code_ptr + ((packed >> 16) & 15)),
            tl.load(code_ptr + ((packed >> 28) & 15)),
            tl.load(code_ptr + ((packed >> 24) & 15)),
        )


@triton.jit
def _scales(absmax_ptr, fine_ptr, coarse_ptr, shift, block, known, SIZE2: tl.constexpr, NESTED: tl.constexpr):
    if NESTED:
        code = tl.load(absmax_ptr + block, mask=known, other=0).to(tl.int32)
        return tl.load(fine_ptr + code) * tl.load(coarse_ptr + block // SIZE2, mask=known, other=0.0) + shift
    else:
        return tl.load(absmax_ptr + block, mask=known, other=0.0)


@triton.jit
def _scaled_x(x_ptr, norm_ptr, column, known, offset, NORM: tl.constexpr):
    """x, and x · (norm's weight), fp32."""
    x = tl.load(x_ptr + column, mask=known, other=0.0).to(tl.float32)
    y = x
    if NORM:
        y = x * (tl.load(norm_ptr + column, mask=known, other=0.0).to(tl.float32) + offset)
    return x, y


@triton.jit
def _row_sums(
    packed_ptr, absmax_ptr, fine_ptr, coarse_ptr, shift, own, words, blocks, at, inside,
    x0, x1, x2, x3, x4, x5, x6, x7, code_ptr, l0, l1, l2, l3, h0, h1, h2, h3,
    SIZE: tl.constexpr, SIZE2: tl.constexpr, NESTED: tl.constexpr, TABLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Σ over the words `at` of weights times x for rows own to own + ROWS: [ROWS]."""
    index = tl.arange(0, ROWS)
    y = tl.zeros([ROWS], tl.float32)
    here = packed_ptr + own * words + at
    packed = tl.load(here, mask=inside, other=0)
    packed_next = tl.load(here + words, mask=inside & (ROWS > 1), other=0)
    for r in range(ROWS):
        # Two rows ahead of what is multiplied.
        after = tl.load(here + (r + 2) * words, mask=inside & (r + 2 < ROWS), other=0)
        block = (own + r) * blocks + at // (SIZE // 8)
        scale = _scales(absmax_ptr, fine_ptr, coarse_ptr, shift, block, inside, SIZE2, NESTED)
        v0, v1, v2, v3, v4, v5, v6, v7 = _values(packed, code_ptr, l0, l1, l2, l3, h0, h1, h2, h3, TABLE)
        part = v0 * x0 + v1 * x1 + v2 * x2 + v3 * x3 + v4 * x4 + v5 * x5 + v6 * x6 + v7 * x7
        y += tl.where(index == r, tl.sum(part * scale, 0), 0.0)
        packed = packed_next
        packed_next = after
    return y


@triton.jit
def _one_row(
    x_ptr, code_ptr, l0, l1, l2, l3, h0, h1, h2, h3, packed0, packed1, packed2, absmax0, absmax1, absmax2,
    coarse0, coarse1, coarse2, shift0, shift1, shift2, fine0, fine1, fine2,
    norm_ptr, bias_ptr, residual_ptr, out_ptr, slots_ptr, xa_ptr, b_ptr,
    rows, rows0, rows1, words, outs, end0, end1, parts_rank, eps, offset,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GLU: tl.constexpr, R: tl.constexpr,
    PARTS: tl.constexpr, NESTED: tl.constexpr, SIZE: tl.constexpr, SIZE2: tl.constexpr, TABLE: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
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
    width, blocks = words * 8, words // (SIZE // 8)
    own = (first - begin).to(tl.int64)
    word = tl.arange(0, WORDS)
    if PDL:
        launch_next()
        wait_for_last()
    y = tl.zeros([ROWS], tl.float32)
    up = tl.zeros([ROWS], tl.float32)
    square = tl.zeros([WORDS], tl.float32)
    for start in range(0, words, WORDS):
        inside = word < words - start
        at = start + word
        r0, x0 = _scaled_x(x_ptr, norm_ptr, at * 8, inside, offset, NORM)
        r1, x1 = _scaled_x(x_ptr, norm_ptr, at * 8 + 1, inside, offset, NORM)
        r2, x2 = _scaled_x(x_ptr, norm_ptr, at * 8 + 2, inside, offset, NORM)
        r3, x3 = _scaled_x(x_ptr, norm_ptr, at * 8 + 3, inside, offset, NORM)
        r4, x4 = _scaled_x(x_ptr, norm_ptr, at * 8 + 4, inside, offset, NORM)
        r5, x5 = _scaled_x(x_ptr, norm_ptr, at * 8 + 5, inside, offset, NORM)
        r6, x6 = _scaled_x(x_ptr, norm_ptr, at * 8 + 6, inside, offset, NORM)
        r7, x7 = _scaled_x(x_ptr, norm_ptr, at * 8 + 7, inside, offset, NORM)
        if NORM:
            square += r0 * r0 + r1 * r1 + r2 * r2 + r3 * r3 + r4 * r4 + r5 * r5 + r6 * r6 + r7 * r7
        y += _row_sums(
            packed_ptr, absmax_ptr, fine_ptr, coarse_ptr, shift, own, words, blocks, at, inside,
            x0, x1, x2, x3, x4, x5, x6, x7, code_ptr, l0, l1, l2, l3, h0, h1, h2, h3,
            SIZE, SIZE2, NESTED, TABLE, ROWS,
        )  # fmt: skip
        if GLU != "":
            up += _row_sums(
                packed1, absmax1, fine1, coarse1, shift_up, own, words, blocks, at, inside,
                x0, x1, x2, x3, x4, x5, x6, x7, code_ptr, l0, l1, l2, l3, h0, h1, h2, h3,
                SIZE, SIZE2, NESTED, TABLE, ROWS,
            )  # fmt: skip
    if NORM:
        rstd = 1.0 / tl.sqrt(tl.sum(square, 0) / width + eps)
        y *= rstd
        up *= rstd
    if BIAS:
        y += tl.load(bias_ptr + row, mask=known, other=0.0).to(tl.float32)
        if GLU != "":
            up += tl.load(bias_ptr + rows + row, mask=known, other=0.0).to(tl.float32)
    if R > 0:
        y += own_share(xa_ptr, b_ptr, slots_ptr, 0, row, known, outs, end0, end1, parts_rank, R)
        if GLU != "":
            up += own_share(xa_ptr, b_ptr, slots_ptr, 0, rows + row, known, outs, end0, end1, parts_rank, R)
    if GLU != "":
        value, _ = value_and_slope(y, GLU)
        y = value * up
    if RESIDUAL:
        y += tl.load(residual_ptr + row, mask=known, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, y.to(out_ptr.dtype.element_ty), mask=known)


@triton.jit
def _tile_product(
    sums, packed, scale, x_ptr, norm_ptr, at, inside, there, b, x_stride, offset, code_ptr,
    l0, l1, l2, l3, h0, h1, h2, h3, kind: tl.constexpr, NORM: tl.constexpr, TABLE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """sums [ROWS, BATCH] + weights of the words `at` times x, and Σ x² [BATCH]."""
    values = _values(packed, code_ptr, l0, l1, l2, l3, h0, h1, h2, h3, TABLE)
    square = tl.zeros([there.shape[0]], tl.float32)
    for j in tl.static_range(8):
        column = at * 8 + j
        x = tl.load(
            x_ptr + b[:, None] * x_stride + column[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        if NORM:
            wide = x.to(tl.float32)
            square += tl.sum(wide * wide, 1)
            factor = tl.load(norm_ptr + column, mask=inside, other=0.0).to(tl.float32) + offset
            x = (wide * factor[None, :]).to(kind)
        sums += dot((values[j] * scale).to(kind), tl.trans(x), WIDE)
    return sums, square


@triton.jit
def _few_rows(
    x_ptr, code_ptr, l0, l1, l2, l3, h0, h1, h2, h3, packed0, packed1, packed2, absmax0, absmax1, absmax2,
    coarse0, coarse1, coarse2, shift0, shift1, shift2, fine0, fine1, fine2,
    norm_ptr, bias_ptr, residual_ptr, out_ptr, slots_ptr, xa_ptr, b_ptr,
    rows, rows0, rows1, words, x_stride, out_stride, batch, outs, end0, end1, parts_rank, eps, offset,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GLU: tl.constexpr, R: tl.constexpr,
    PARTS: tl.constexpr, NESTED: tl.constexpr, SIZE: tl.constexpr, SIZE2: tl.constexpr, TABLE: tl.constexpr,
    WIDE: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
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
    width, blocks = words * 8, words // (SIZE // 8)
    own = (row - begin).to(tl.int64)
    word, b = tl.arange(0, WORDS), tl.arange(0, BATCH)
    there = b < batch
    kind: tl.constexpr = x_ptr.dtype.element_ty
    at = own[:, None] * words + word[None, :]
    packed = tl.load(packed_ptr + at, mask=known[:, None] & (word < words)[None, :], other=0)
    if PDL:
        launch_next()
        wait_for_last()
    sums = tl.zeros([ROWS, BATCH], tl.float32)
    up = tl.zeros([ROWS, BATCH], tl.float32)
    square = tl.zeros([BATCH], tl.float32)
    for start in range(0, words, WORDS):
        inside = word < words - start
        mask = known[:, None] & inside[None, :]
        ahead = known[:, None] & (word < words - start - WORDS)[None, :]
        packed_next = tl.load(packed_ptr + at + start + WORDS, mask=ahead, other=0)
        block = own[:, None] * blocks + ((start + word) // (SIZE // 8))[None, :]
        scale = _scales(absmax_ptr, fine_ptr, coarse_ptr, shift, block, mask, SIZE2, NESTED)
        sums, part = _tile_product(
            sums, packed, scale, x_ptr, norm_ptr, start + word, inside, there, b, x_stride, offset, code_ptr,
            l0, l1, l2, l3, h0, h1, h2, h3, kind, NORM, TABLE, WIDE,
        )  # fmt: skip
        square += part
        if GLU != "":
            packed_up = tl.load(packed1 + at + start, mask=mask, other=0)
            scale = _scales(absmax1, fine1, coarse1, shift_up, block, mask, SIZE2, NESTED)
            up, part = _tile_product(
                up, packed_up, scale, x_ptr, norm_ptr, start + word, inside, there, b, x_stride, offset, code_ptr,
                l0, l1, l2, l3, h0, h1, h2, h3, kind, NORM, TABLE, WIDE,
            )  # fmt: skip
        packed = packed_next
    if NORM:
        rstd = 1.0 / tl.sqrt(square / width + eps)
        sums *= rstd[None, :]
        up *= rstd[None, :]
    if BIAS:
        sums += tl.load(bias_ptr + row, mask=known, other=0.0).to(tl.float32)[:, None]
        if GLU != "":
            up += tl.load(bias_ptr + rows + row, mask=known, other=0.0).to(tl.float32)[:, None]
    if R > 0:
        for i in range(batch):
            mine = (b == i)[None, :]
            share = own_share(xa_ptr, b_ptr, slots_ptr, i, row, known, outs, end0, end1, parts_rank, R)
            sums += tl.where(mine, share[:, None], 0.0)
            if GLU != "":
                share = own_share(
                    xa_ptr, b_ptr, slots_ptr, i, rows + row, known, outs, end0, end1, parts_rank, R
                )
                up += tl.where(mine, share[:, None], 0.0)
    if GLU != "":
        value, _ = value_and_slope(sums, GLU)
        sums = value * up
    to = b[None, :] * out_stride + row[:, None]
    mask = known[:, None] & there[None, :]
    if RESIDUAL:
        sums += tl.load(residual_ptr + to, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + to, sums.to(out_ptr.dtype.element_ty), mask=mask)


def one_row_config(rows: int, width: int) -> dict[str, int]:
    """A whole row of 4,096 weights at a time, eight outputs a program, which share what a thread has of x."""
    warps = 4 if width >= 4096 else 2 if width >= 2048 else 1
    return {"ROWS": 8 if rows >= 4096 else 4, "WORDS": 128 * warps, "num_warps": warps}


def few_rows_config(rows: int) -> dict[str, int]:
    """Tiles of 16 outputs by 256 weights."""
    return {"ROWS": 16, "WORDS": 32, "num_warps": 4 if rows >= 4096 else 2}


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
    share: RowShare | None,
    residual: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    x = unit_rows(x)
    batch, width = x.shape
    if batch > MOST_ROWS or len(parts) > 3:
        raise ValueError(f"{batch} rows, {len(parts)} weights")
    outs = sum(part.rows for part in parts)
    rows = outs // 2 if activation is not None else outs
    out = residual if residual is not None else torch.empty(batch, rows, dtype=out_dtype, device=x.device)
    pointers, numbers, kinds = arguments(x, norm, bias, share, residual, activation, out, outs)
    padded = [*parts, *[parts[-1]] * (3 - len(parts))]
    bits = [part.bits for part in padded]
    nested = [part.second for part in bits]
    config = one_row_config(rows, width) if batch == 1 else few_rows_config(rows)
    # A program's outputs are all of one weight.
    while any(part.rows % config["ROWS"] for part in (parts if batch == 1 else parts[:-1])):
        config["ROWS"] //= 2
    pdl = dependent_launch(x.device)
    codes = (
        x, bits[0].code, *table_words(parts[0].numbers),
        *(part.packed.view(-1).view(torch.int32) for part in bits), *(part.absmax for part in bits),
        *(n[1] for n in nested), *(n[2] for n in nested), *(n[0] for n in nested),
    )  # fmt: skip
    kinds |= {
        "PARTS": len(parts),
        "NESTED": bits[0].nested is not None,
        "SIZE": bits[0].blocksize,
        "SIZE2": nested[0][3],
        "TABLE": x.is_cuda,
        "PDL": bool(pdl),
    }
    grid = (triton.cdiv(rows, config["ROWS"]),)
    if batch == 1:
        _one_row[grid](
            *codes,
            *pointers,
            rows,
            padded[0].rows,
            padded[1].rows,
            width // 8,
            *numbers,
            **kinds,
            **config,
            **pdl,
        )
        return out
    _few_rows[grid](
        *codes, *pointers, rows, padded[0].rows, padded[1].rows, width // 8, x.stride(0), out.stride(0), batch,
        *numbers, **kinds, WIDE=is_wide(x), BATCH=PADDED_ROWS, **config, **pdl,
    )  # fmt: skip
    return out
