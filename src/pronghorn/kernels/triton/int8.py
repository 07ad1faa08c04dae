"""Rows to int8 codes in Triton, turned on the way, in one pass over memory: see `kernels.int8`.

A row is held as a matrix of its blocks, [W / 64, 64], which one product with the 64 x 64 matrix of ±1 turns: exact
factors, sums in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.int8 import ROTATIONS, rotation_of
from pronghorn.kernels.triton.launch import programs, row_block, unit_rows
from pronghorn.kernels.triton.lora import dot, is_wide, limits, three

TINY = tl.constexpr(2.0**-100)
# fp32 holds integers only from this on, so that adding it rounds to the nearest, ties to even; the sum's low byte is
# the integer.
WHOLE = tl.constexpr(1.5 * 2.0**23)
#: numbers of a row that one program holds; longer rows are read twice
HELD = 32768


@triton.jit
def sizes(x):
    """|x| of fp32 numbers as integers in the same order, NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest, FACTOR: tl.constexpr):
    """The scale of rows, from `sizes` of the largest number before it is multiplied with FACTOR."""
    largest = largest.to(tl.float32, bitcast=True) * FACTOR
    # A comparison that NaN fails, so that it stays.
    return tl.where(largest < 127.0 * TINY, TINY, largest / 127.0)


@triton.jit
def to_codes(x, inverse):
    """rint(x · inverse) as int8 for |x · inverse| <= 127."""
    return (x * inverse + WHOLE).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def signs(SIZE: tl.constexpr, dtype: tl.constexpr):
    """`kernels.int8.hadamard`."""
    odd = tl.arange(0, SIZE)[:, None] & tl.arange(0, SIZE)[None, :]
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    return (1 - 2 * (odd & 1)).to(tl.float32).to(dtype)


@triton.jit
def turned(x, LANES: tl.constexpr, ROTATE: tl.constexpr, WIDE: tl.constexpr):
    """x · H · √LANES of blocks [N, LANES] in fp32; without ROTATE x as it is."""
    if ROTATE:
        return dot(x, signs(LANES, x.dtype), WIDE)
    else:
        return x.to(tl.float32)


@triton.jit
def _load(
    a_ptr, b_ptr, c_ptr, columns_ptr, a_stride, b_stride, c_stride, a_blocks, ab_blocks, blocks, row, known_row, block,
    PARTS: tl.constexpr, HAS_COLUMNS: tl.constexpr, LANES: tl.constexpr, ROTATE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Blocks [N, LANES] of rows that lie in up to three tensors, turned, in fp32; zeros past their ends."""
    lane = tl.arange(0, LANES)
    base = a_ptr + row * a_stride
    if PARTS > 1:
        base = tl.where(block >= a_blocks, b_ptr + row * b_stride - a_blocks * LANES, base)
    if PARTS > 2:
        base = tl.where(block >= ab_blocks, c_ptr + row * c_stride - ab_blocks * LANES, base)
    inside = (known_row & (block < blocks))[:, None]
    at = (block * LANES)[:, None] + lane[None, :]
    x = turned(tl.load(base[:, None] + at, mask=inside, other=0.0), LANES, ROTATE, WIDE)
    if HAS_COLUMNS:
        x *= tl.load(columns_ptr + at, mask=inside, other=0.0)
    return x


@triton.jit
def largest_of(x, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """`sizes` [ROWS] of the largest numbers of rows that have COUNT blocks each, x [ROWS · COUNT, LANES]."""
    return tl.max(tl.reshape(tl.max(sizes(x), 1), (ROWS, COUNT)), 1)


@triton.jit
def store_codes(
    codes_ptr, x, scale, row, known, block, blocks,
    FACTOR: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Codes of blocks [ROWS · COUNT, LANES] for scales [ROWS]."""
    inverse = tl.reshape(tl.broadcast_to((FACTOR / scale)[:, None], (ROWS, COUNT)), (ROWS * COUNT,))
    at = (row * blocks + block) * LANES
    to = codes_ptr + at[:, None] + tl.arange(0, LANES)[None, :]
    tl.store(to, to_codes(x, inverse[:, None]), mask=(known & (block < blocks))[:, None])


# Numbers of rows and blocks tell the compiler nothing that it needs, and would be one more kernel each.
@triton.jit(do_not_specialize=["a_blocks", "ab_blocks", "blocks", "rows", "programs"])
def _quantise_held(
    a_ptr, b_ptr, c_ptr, columns_ptr, codes_ptr, scales_ptr, a_stride, b_stride, c_stride,
    a_blocks, ab_blocks, blocks, rows, programs,
    PARTS: tl.constexpr, HAS_COLUMNS: tl.constexpr, LANES: tl.constexpr, ROTATE: tl.constexpr, FACTOR: tl.constexpr,
    ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Whole rows a program, as MAIN blocks and REST more; from rows to rows, so that the next ones are on their way."""
    main, rest = tl.arange(0, ROWS * MAIN), tl.arange(0, ROWS * (REST or 1))
    offset = tl.arange(0, ROWS)
    for start in tl.range(tl.program_id(0) * ROWS, rows, programs * ROWS, num_stages=STAGES):
        row = (start + main // MAIN).to(tl.int64)
        block = main % MAIN
        x = _load(
            a_ptr, b_ptr, c_ptr, columns_ptr, a_stride, b_stride, c_stride, a_blocks, ab_blocks, blocks,
            row, row < rows, block, PARTS, HAS_COLUMNS, LANES, ROTATE, WIDE,
        )  # fmt: skip
        largest = largest_of(x, ROWS, MAIN)
        if REST:
            row_rest = (start + rest // REST).to(tl.int64)
            block_rest = MAIN + rest % REST
            x_rest = _load(
                a_ptr, b_ptr, c_ptr, columns_ptr, a_stride, b_stride, c_stride, a_blocks, ab_blocks, blocks,
                row_rest, row_rest < rows, block_rest, PARTS, HAS_COLUMNS, LANES, ROTATE, WIDE,
            )  # fmt: skip
            largest = tl.maximum(largest, largest_of(x_rest, ROWS, REST))
        scale = scale_of(largest, FACTOR)
        tl.store(scales_ptr + start + offset, scale, mask=start + offset < rows)
        store_codes(codes_ptr, x, scale, row, row < rows, block, blocks, FACTOR, ROWS, MAIN, LANES)
        if REST:
            store_codes(
                codes_ptr,
                x_rest,
                scale,
                row_rest,
                row_rest < rows,
                block_rest,
                blocks,
                FACTOR,
                ROWS,
                REST,
                LANES,
            )


@triton.jit(do_not_specialize=["a_blocks", "ab_blocks", "blocks"])
def _quantise_long(
    a_ptr, b_ptr, c_ptr, columns_ptr, codes_ptr, scales_ptr, a_stride, b_stride, c_stride,
    a_blocks, ab_blocks, blocks,
    PARTS: tl.constexpr, HAS_COLUMNS: tl.constexpr, LANES: tl.constexpr, ROTATE: tl.constexpr, FACTOR: tl.constexpr,
    COUNT: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A row a program, read twice, COUNT blocks at a time: the second time out of the L2 cache."""
    index = tl.arange(0, COUNT)
    row = (tl.program_id(0) + tl.zeros([COUNT], tl.int32)).to(tl.int64)
    largest = tl.zeros([COUNT], tl.int32)
    for first in tl.range(0, blocks, COUNT, num_stages=STAGES):
        block = first + index
        x = _load(
            a_ptr, b_ptr, c_ptr, columns_ptr, a_stride, b_stride, c_stride, a_blocks, ab_blocks, blocks,
            row, block >= 0, block, PARTS, HAS_COLUMNS, LANES, ROTATE, WIDE,
        )  # fmt: skip
        largest = tl.maximum(largest, tl.max(sizes(x), 1))
    scale = scale_of(tl.max(tl.reshape(largest, (1, COUNT)), 1), FACTOR)
    tl.store(scales_ptr + tl.program_id(0) + tl.arange(0, 1), scale)
    for first in tl.range(0, blocks, COUNT, num_stages=STAGES):
        block = first + index
        x = _load(
            a_ptr, b_ptr, c_ptr, columns_ptr, a_stride, b_stride, c_stride, a_blocks, ab_blocks, blocks,
            row, block >= 0, block, PARTS, HAS_COLUMNS, LANES, ROTATE, WIDE,
        )  # fmt: skip
        store_codes(codes_ptr, x, scale, row, block >= 0, block, blocks, FACTOR, 1, COUNT, LANES)


@triton.jit
def _quantise_plain(
    x_ptr, columns_ptr, codes_ptr, scales_ptr, x_stride, width, HAS_COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row of any width a program, not turned."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_COLUMNS:
        x = x * tl.load(columns_ptr + columns, mask=inside, other=0.0)
    scale = scale_of(tl.max(sizes(x), 0), 1.0)
    tl.store(scales_ptr + row, scale)
    tl.store(codes_ptr + row * width + columns, to_codes(x, 1.0 / scale), mask=inside)


class Held(NamedTuple):
    """How `_quantise_held` holds rows."""

    rows: int
    main: int
    rest: int
    warps: int
    stages: int
    per_processor: int


class Long(NamedTuple):
    """How `_quantise_long` reads rows."""

    blocks: int
    warps: int
    stages: int


def held(blocks: int, lanes: int, element: int, shared: int) -> Held:
    """Powers of two that waste little: one for all blocks, or one for most and one for the rest.

    Args:
        element: bytes that go through the stages for each number. shared: bytes of shared memory of a program.
    """
    whole = max(triton.next_power_of_2(blocks), 16)
    main = whole if whole == blocks or whole == 16 else whole // 2
    rest = max(triton.next_power_of_2(blocks - main), 16) if blocks > main else 0
    if main + rest >= whole:
        main, rest = whole, 0
    rows = max(1, 4096 // (lanes * (main + rest)))
    numbers = rows * (main + rest) * lanes
    warps = 4 if numbers <= 6144 else 8 if numbers <= 16384 else 16
    # One row is worked on, one is there, one is on its way.
    stages = max(1, min(3, (shared - 24 * 1024) // (numbers * element)))
    resident = 4 if numbers <= 6144 else 3 if numbers <= 10240 else 2 if numbers <= 16384 else 1
    return Held(rows, main, rest, warps, stages, resident)


def way_of(blocks: int, lanes: int, element: int, shared: int) -> Held | Long:
    """How rows of that many blocks are quantised; arguments as those of `held`."""
    way, width = held(blocks, lanes, element, shared), blocks * lanes
    # Alone on its processor a program must have much to hold, or it waits too often; so it does without stages.
    alone = way.per_processor == 1 and (width < HELD * 3 // 4 or way.stages == 1)
    return Long(4096 // lanes, 4, 3) if width > HELD or alone else way


def quantise_joined(
    parts: Sequence[Tensor], columns: Tensor | None, rotated: bool, way: Held | Long | None = None
) -> tuple[Tensor, Tensor]:
    """`way`: how rows are held or read; None chooses."""
    parts = [unit_rows(part) for part in parts]
    width, rows, device = sum(part.shape[1] for part in parts), parts[0].shape[0], parts[0].device
    lanes = rotation_of(width)
    if len(parts) > 1 and (len(parts) > 3 or not lanes or any(part.shape[1] % lanes for part in parts)):
        parts = [torch.cat(parts, 1)]
    codes = torch.empty(rows, width, dtype=torch.int8, device=device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=device)
    if not rows:
        return codes, scales
    columns = None if columns is None else columns.contiguous()
    given = parts[0] if columns is None else columns
    if not rotated and len(parts) == 1 and width <= HELD:
        block, warps = row_block(width)
        _quantise_plain[(rows,)](
            parts[0], given, codes, scales, parts[0].stride(0), width,
            HAS_COLUMNS=columns is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        return codes, scales
    if not lanes:
        raise ValueError(f"rows of {width} numbers cannot be cut into blocks of {ROTATIONS}")
    a, b, c = three(list(parts))
    blocks, first = width // lanes, parts[0].shape[1] // lanes
    both = first + (parts[1].shape[1] // lanes if len(parts) > 1 else 0)
    arguments = (a, b, c, given, codes, scales, a.stride(0), b.stride(0), c.stride(0), first, both, blocks)
    constants = {
        "PARTS": len(parts), "HAS_COLUMNS": columns is not None, "LANES": lanes, "ROTATE": rotated,
        "FACTOR": lanes**-0.5 if rotated else 1.0, "WIDE": is_wide(a),
    }  # fmt: skip
    if way is None:
        # The factors of columns go through the same stages as the numbers, in fp32.
        staged = a.element_size() + (0 if columns is None else columns.element_size())
        way = way_of(blocks, lanes, staged, limits(device)[1])
    if isinstance(way, Long):
        _quantise_long[(rows,)](
            *arguments, **constants, COUNT=way.blocks, STAGES=way.stages, num_warps=way.warps
        )
    else:
        count = programs(triton.cdiv(rows, way.rows), device, way.per_processor)
        _quantise_held[(count,)](
            *arguments, rows, count, **constants, ROWS=way.rows, MAIN=way.main, REST=way.rest, STAGES=way.stages,
            num_warps=way.warps,
        )  # fmt: skip
    return codes, scales


@triton.jit(do_not_specialize=["blocks", "each"])
def _turn(
    x_ptr, scales_ptr, out_ptr, blocks, each,
    CODES: tl.constexpr, LANES: tl.constexpr, ROTATE: tl.constexpr, FACTOR: tl.constexpr, COUNT: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """x · H of COUNT blocks a program; of codes, which are whole numbers in bf16 too, times their rows' scales."""
    block = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    at = (block * LANES)[:, None] + tl.arange(0, LANES)[None, :]
    inside = block < blocks
    x = tl.load(x_ptr + at, mask=inside[:, None], other=0)
    if CODES:
        x = x.to(tl.float32) if WIDE else x.to(tl.bfloat16)
    x = turned(x, LANES, ROTATE, WIDE) * FACTOR
    if CODES:
        x *= tl.load(scales_ptr + block // each, mask=inside, other=0.0)[:, None]
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside[:, None])


def rotate(x: Tensor) -> Tensor:
    x = x.contiguous()
    return _turned(x, x, torch.empty_like(x), True)


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype, rotated: bool) -> Tensor:
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    return _turned(codes.contiguous(), scales.contiguous(), out, rotated)


def _turned(x: Tensor, scales: Tensor, out: Tensor, rotated: bool) -> Tensor:
    lanes = rotation_of(x.shape[-1])
    blocks = x.numel() // lanes
    if blocks:
        _turn[(triton.cdiv(blocks, 64),)](
            x, scales, out, blocks, x.shape[-1] // lanes, CODES=x.dtype == torch.int8, LANES=lanes, ROTATE=rotated,
            FACTOR=lanes**-0.5 if rotated else 1.0, COUNT=64, WIDE=is_wide(x), num_warps=4,
        )  # fmt: skip
    return out
