"""e4m3 in Triton: rows to codes, codes transposed, 4-bit weights to codes. One pass over memory each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.nf4 import FourBits
from pronghorn.kernels.triton.launch import row_block, unit_rows
from pronghorn.kernels.triton.lora import three

E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def scale_for(largest):
    """The least power of two that brings numbers up to `largest`, fp32, within 448; see `kernels.fp8.row_scales`."""
    exponent = ((largest.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8
    return (tl.maximum(exponent, 27) << 23).to(tl.float32, bitcast=True)


@triton.jit
def inverse(scale):
    """1 / scale of a power of two."""
    return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def column_factors(columns_ptr, column, known):
    """Factors of columns in fp32, given as they are or as int8 exponents of two."""
    factor = tl.load(columns_ptr + column, mask=known, other=0)
    if columns_ptr.dtype.element_ty == tl.int8:
        return ((factor.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    else:
        return factor.to(tl.float32)


@triton.jit
def row_scale(x):
    """The scale of a row of fp32 numbers held by a program."""
    return scale_for(tl.max(tl.abs(x), 0))


@triton.jit
def _quantise_tiles(
    x_ptr, columns_ptr, row_max_ptr, codes_ptr, scales_ptr, rows, width, x_stride, codes_stride,
    HAS_COLUMNS: tl.constexpr, ONE_SCALE: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Codes of a tile for scales that are known: of its rows' maxima, or one for everything."""
    column = tl.program_id(0) * BO + tl.arange(0, BO)
    start = tl.program_id(1).to(tl.int64) * BT
    row = tl.arange(0, BT)
    known_row, known_column = row < rows - start, column < width
    inside = known_row[:, None] & known_column[None, :]
    x = tl.load(
        x_ptr + start * x_stride + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0
    ).to(tl.float32)
    if HAS_COLUMNS:
        x = x * column_factors(columns_ptr, column, known_column)[None, :]
    if ONE_SCALE:
        x = x / tl.load(scales_ptr)
    else:
        scale = scale_for(tl.load(row_max_ptr + start + row, mask=known_row, other=1.0))
        x = x * inverse(scale)[:, None]
        if tl.program_id(0) == 0:
            tl.store(scales_ptr + start + row, scale, mask=known_row)
    to = codes_ptr + start * codes_stride + row[:, None] * codes_stride + column[None, :]
    tl.store(to, x.to(tl.float8e4nv), mask=inside)


def _launch_tiles(
    x: Tensor, columns: Tensor | None, row_max: Tensor | None, codes: Tensor, scales: Tensor
) -> None:
    """x · columns into codes, which may be columns of a wider matrix; without row maxima for the one scale."""
    rows, width = x.shape
    block = min(max(triton.next_power_of_2(width), 16), 1024)
    if x.numel():
        _quantise_tiles[(triton.cdiv(width, block), triton.cdiv(rows, 8))](
            x, x if columns is None else columns, scales if row_max is None else row_max, codes, scales, rows, width,
            x.stride(0), codes.stride(0), HAS_COLUMNS=columns is not None, ONE_SCALE=row_max is None,
            BT=8, BO=block, num_warps=max(block // 128, 1),
        )  # fmt: skip


def quantise_with(x: Tensor, scale: Tensor) -> Tensor:
    """Codes for one scale [1, 1]."""
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    _launch_tiles(unit_rows(x), None, None, codes, scale)
    return codes


@triton.jit
def _load_part(x_ptr, columns_ptr, row, stride, width, start, HAS_COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_COLUMNS:
        x = x * column_factors(columns_ptr + start, columns, inside)
    return x


@triton.jit
def _store_part(codes_ptr, x, scale, width, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(codes_ptr + columns, (x * inverse(scale)).to(tl.float8e4nv), mask=columns < width)


@triton.jit
def _quantise_whole(
    a_ptr, b_ptr, c_ptr, columns_ptr, codes_ptr, scales_ptr,
    a_stride, b_stride, c_stride, a_width, b_width, c_width,
    HAS_COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A row of up to three parts a program, which finds its largest number itself."""
    row = tl.program_id(0).to(tl.int64)
    to = codes_ptr + row * (a_width + b_width + c_width)
    a = _load_part(a_ptr, columns_ptr, row, a_stride, a_width, 0, HAS_COLUMNS, BLOCK_A)
    largest = tl.max(tl.abs(a), 0)
    if PARTS > 1:
        b = _load_part(b_ptr, columns_ptr, row, b_stride, b_width, a_width, HAS_COLUMNS, BLOCK_B)
        largest = tl.maximum(largest, tl.max(tl.abs(b), 0))
    if PARTS > 2:
        c = _load_part(c_ptr, columns_ptr, row, c_stride, c_width, a_width + b_width, HAS_COLUMNS, BLOCK_C)
        largest = tl.maximum(largest, tl.max(tl.abs(c), 0))
    scale = scale_for(largest)
    _store_part(to, a, scale, a_width, BLOCK_A)
    if PARTS > 1:
        _store_part(to + a_width, b, scale, b_width, BLOCK_B)
    if PARTS > 2:
        _store_part(to + a_width + b_width, c, scale, c_width, BLOCK_C)
    tl.store(scales_ptr + row, scale)


def quantise_joined(
    parts: Sequence[Tensor], columns: Tensor | None, row_max: Tensor | None
) -> tuple[Tensor, Tensor]:
    parts = [unit_rows(part) for part in parts]
    widths, rows, device = [part.shape[1] for part in parts], parts[0].shape[0], parts[0].device
    codes = torch.empty(rows, sum(widths), dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=device)
    if not rows:
        return codes, scales
    if columns is not None:
        columns = columns.contiguous().view(-1)
    if row_max is not None:
        start = 0
        for part, into in zip(parts, codes.split(widths, 1), strict=True):
            some = None if columns is None else columns[start : start + part.shape[1]]
            _launch_tiles(part, some, row_max, into, scales)
            start += part.shape[1]
        return codes, scales
    a, b, c = three(parts)
    blocks = [triton.next_power_of_2(part.shape[1]) for part in (a, b, c)]
    _quantise_whole[(rows,)](
        a, b, c, a if columns is None else columns, codes, scales,
        a.stride(0), b.stride(0), c.stride(0), *[*widths, 0, 0][:3],
        HAS_COLUMNS=columns is not None, PARTS=len(parts),
        BLOCK_A=blocks[0], BLOCK_B=blocks[1], BLOCK_C=blocks[2], num_warps=row_block(sum(widths))[1],
    )  # fmt: skip
    return codes, scales


@triton.jit
def _transpose(
    in_ptr, scales_ptr, out_ptr, in_stride, rows, width,
    QUANTISE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    tile = tl.load(in_ptr + row[:, None] * in_stride + column[None, :], mask=inside, other=0)
    if QUANTISE:
        scale = tl.load(scales_ptr + row, mask=row < rows, other=1.0)[:, None]
        scaled = tl.minimum(tl.maximum(tile.to(tl.float32) / scale, -E4M3_MAX), E4M3_MAX)
        tile = scaled.to(tl.float8e4nv)
    turned = (column < width)[:, None] & (row < rows)[None, :]
    tl.store(out_ptr + column[:, None] * rows + row[None, :], tl.trans(tile), mask=turned)


def transpose(codes: Tensor) -> Tensor:
    rows, width = codes.shape
    out = torch.empty(width, rows, dtype=codes.dtype, device=codes.device)
    if codes.numel():
        source, target = unit_rows(codes).view(torch.uint8), out.view(torch.uint8)
        # 128 bytes each way is one cache line for every row of the tile, read and written.
        _transpose[(triton.cdiv(rows, 128), triton.cdiv(width, 128))](
            source, source, target, source.stride(0), rows, width,
            QUANTISE=False, BLOCK_ROWS=128, BLOCK_COLUMNS=128, num_warps=8,
        )  # fmt: skip
    return out


def quantise_transposed(weight: Tensor, scales: Tensor) -> Tensor:
    weight = unit_rows(weight)
    rows, width = weight.shape
    out = torch.empty(width, rows, dtype=torch.float8_e4m3fn, device=weight.device)
    if weight.numel():
        _transpose[(triton.cdiv(rows, 128), triton.cdiv(width, 64))](
            weight, scales, out, weight.stride(0), rows, width,
            QUANTISE=True, BLOCK_ROWS=128, BLOCK_COLUMNS=64, num_warps=8,
        )  # fmt: skip
    return out


@triton.jit
def _from_four_bit(
    packed_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, scales_ptr, out_ptr, rows, width,
    blocksize: tl.constexpr, blocksize2: tl.constexpr, NESTED: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    byte = tl.program_id(1) * BLOCK_BYTES + tl.arange(0, BLOCK_BYTES)
    in_rows = (row < rows)[:, None]
    inside = in_rows & (2 * byte < width)[None, :]
    block = row[:, None] * (width // blocksize) + (2 * byte // blocksize)[None, :]
    if NESTED:
        quantised = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        coarse = tl.load(absmax2_ptr + block // blocksize2, mask=inside, other=0.0)
        factor = tl.load(code2_ptr + quantised) * coarse + tl.load(offset_ptr)
    else:
        factor = tl.load(absmax_ptr + block, mask=inside, other=0.0)
    factor = factor / tl.load(scales_ptr + row, mask=row < rows, other=1.0)[:, None]
    packed = tl.load(packed_ptr + row[:, None] * (width // 2) + byte[None, :], mask=inside, other=0).to(
        tl.int32
    )
    high = (tl.load(code_ptr + (packed >> 4)) * factor).to(tl.float8e4nv)
    low = (tl.load(code_ptr + (packed & 15)) * factor).to(tl.float8e4nv)
    values = tl.interleave(high, low)
    column = (tl.program_id(1) * (2 * BLOCK_BYTES) + tl.arange(0, 2 * BLOCK_BYTES)).to(tl.int64)
    in_columns = column < width
    if TRANSPOSED:
        to = out_ptr + column[:, None] * rows + row[None, :]
        tl.store(to, tl.trans(values), mask=in_columns[:, None] & (row < rows)[None, :])
    else:
        to = out_ptr + row[:, None] * width + column[None, :]
        tl.store(to, values, mask=in_rows & in_columns[None, :])


def from_four_bit(bits: FourBits, scales: Tensor, transposed: bool) -> Tensor:
    rows, width = bits.shape
    code2, absmax2, offset, blocksize2 = bits.second
    out_shape = (width, rows) if transposed else (rows, width)
    out = torch.empty(out_shape, dtype=torch.float8_e4m3fn, device=bits.packed.device)
    # Transposed, a tile is a cache line wide both ways; else rows are short and long runs of bytes are better.
    block_rows, block_bytes = (64, 32) if transposed else (4, 256)
    if out.numel():
        _from_four_bit[(triton.cdiv(rows, block_rows), triton.cdiv(width, 2 * block_bytes))](
            bits.packed, bits.absmax, bits.code, code2, absmax2, offset, scales, out, rows, width,
            blocksize=bits.blocksize, blocksize2=blocksize2, NESTED=bits.nested is not None, TRANSPOSED=transposed,
            BLOCK_ROWS=block_rows, BLOCK_BYTES=block_bytes, num_warps=4,
        )  # fmt: skip
    return out
