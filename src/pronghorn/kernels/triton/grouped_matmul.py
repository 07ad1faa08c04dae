"""Grouped products in Triton: one program makes one tile of one expert's rows; see `kernels.grouped_matmul`.

Where the tiles of each expert begin is worked out on the device (`tile_map`), once for a routing and a height of tiles.
The grid has room for the most tiles there can be, S / BM + E; what is beyond the real ones returns at once. Tiles of an
expert follow each other, the columns first, so that its weights are read from memory once and from the cache after.
On Hopper and later tiles come by TMA: the stack is one matrix [E · N, K] to it, whose tile may begin in any expert, and
rows that belong to the next expert are read and not stored.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.dispatch import math_dtype
from pronghorn.kernels.grouped_matmul import Groups, LowRankRows
from pronghorn.kernels.triton.launch import unit_rows
from pronghorn.kernels.triton.lora import LEAST_RANK, dot, is_wide

#: rows an expert on average up to which tiles are low: a decoding step's
FEW_ROWS = 8
#: tiles that a program of `_tile_map` places
_MAPPED = 64


class Tiles(NamedTuple):
    """Heights and widths of a product's tiles, and how it is launched."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def matmul_tiles(columns: int, wide: bool, few: bool = False) -> Tiles:
    """By the product's width: narrow ones (an adapter's A) read x once and are bound by that. `few` rows an expert are
    bound by reading weights, which takes many programs with much in flight."""
    if wide:  # fp32 factors: no matrix units, little shared memory
        return Tiles(32, max(16, min(64, triton.next_power_of_2(columns))), 32, 4, 2)
    if few:
        return Tiles(16, max(16, min(64, triton.next_power_of_2(columns))), 128, 4, 4)
    if columns <= 64:
        return Tiles(128, max(16, triton.next_power_of_2(columns)), 128, 4, 3)
    return Tiles(128, 128 if columns < 256 else 256, 64, 8, 3)


def outer_tiles(rows: int, columns: int, wide: bool) -> Tiles:
    """Tiles of a gradient [rows, columns]; `inner` is how many of the summed rows are read at a time."""
    most = 64 if wide else 128
    height, width = (max(16, min(most, triton.next_power_of_2(side))) for side in (rows, columns))
    return Tiles(height, width, 32 if wide else 64, 4, 2 if wide else 3)


# --- where tiles begin ---------------------------------------------------------------------------------------------


@triton.jit
def _tile_map(ends_ptr, map_ptr, groups, count, BM: tl.constexpr, E: tl.constexpr, BT: tl.constexpr):
    """map [3, count]: each tile's expert (-1: there is none), its first row, and the end of the expert's rows."""
    e = tl.arange(0, E)
    known = e < groups
    begin = tl.load(ends_ptr + e - 1, mask=known & (e > 0), other=0)
    end = tl.load(ends_ptr + e, mask=known, other=0)
    tiles = tl.where(known, tl.cdiv(end - begin, BM), 0)
    after = tl.cumsum(tiles, 0)
    tile = tl.program_id(0) * BT + tl.arange(0, BT)
    mine = (tile[:, None] < after[None, :]) & (tile[:, None] >= (after - tiles)[None, :])
    expert = tl.sum(tl.where(mine, e[None, :], 0), 1)
    first = tl.sum(tl.where(mine, (begin - (after - tiles) * BM)[None, :], 0), 1) + tile * BM
    last = tl.sum(tl.where(mine, end[None, :], 0), 1)
    found = tl.sum(mine.to(tl.int32), 1) > 0
    inside = tile < count
    tl.store(map_ptr + tile, tl.where(found, expert, -1), mask=inside)
    tl.store(map_ptr + count + tile, first, mask=inside)
    tl.store(map_ptr + 2 * count + tile, last, mask=inside)


def tile_map(groups: Groups, rows: int, height: int) -> Tensor:
    """int32 [3, tiles] for `rows` sorted rows; kept with the groups."""
    found = groups.tiles.get(height)
    if found is None:
        count = rows // height + min(groups.count, rows)
        found = torch.empty(3, count, dtype=torch.int32, device=groups.ends.device)
        _tile_map[(triton.cdiv(count, _MAPPED),)](
            groups.ends, found, groups.count, count,
            BM=height, E=triton.next_power_of_2(groups.count), BT=_MAPPED, num_warps=4,
        )  # fmt: skip
        groups.tiles[height] = found
    return found


@triton.jit
def _add_product(acc, a, b, WIDE: tl.constexpr):
    """acc + a @ b in fp32, in acc's registers where matrix units do it."""
    if WIDE:
        return acc + dot(a, b, WIDE)
    return tl.dot(a, b, acc)


# --- forward and input gradient ------------------------------------------------------------------------------------


@triton.jit
def _matmul(
    x, weight, out_ptr, left_ptr, right_ptr, map_ptr, count, n, k, rank, x_stride, w_rows, w_stride,
    left_stride, right_expert, right_column, right_rank,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
    TRANSPOSED: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """w_rows: rows of one expert's matrix as it lies, N or (TRANSPOSED) K; w_stride between them."""
    tiles_n = tl.cdiv(n, BN)
    tile = tl.program_id(0) // tiles_n
    expert = tl.load(map_ptr + tile)
    if expert < 0:
        return
    first, end = tl.load(map_ptr + count + tile), tl.load(map_ptr + 2 * count + tile)
    column = (tl.program_id(0) % tiles_n) * BN
    rows, columns = first + tl.arange(0, BM), column + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    known_row, known_column = rows < end, columns < n
    acc = tl.zeros([BM, BN], tl.float32)
    if TMA:
        top = expert * w_rows
        for at in range(0, k, BK):
            tile_x = x.load([first, at])
            if TRANSPOSED:
                acc = tl.dot(tile_x, weight.load([top + at, column]), acc)
            else:
                acc = tl.dot(tile_x, weight.load([top + column, at]).T, acc)
    else:
        from_x = x + rows.to(tl.int64)[:, None] * x_stride + inner[None, :]
        base = weight + expert.to(tl.int64) * w_rows * w_stride
        if TRANSPOSED:
            from_w, step = base + inner[:, None] * w_stride + columns[None, :], BK * w_stride
        else:
            from_w, step = base + columns[None, :] * w_stride + inner[:, None], BK
        for at in range(0, k, BK):
            known = inner < k - at
            tile_x = tl.load(from_x, mask=known_row[:, None] & known[None, :], other=0.0)
            tile_w = tl.load(from_w, mask=known[:, None] & known_column[None, :], other=0.0)
            acc = _add_product(acc, tile_x, tile_w, WIDE)
            from_x += BK
            from_w += step
    if R > 0:
        r = tl.arange(0, R)
        known = r < rank
        left = tl.load(
            left_ptr + rows.to(tl.int64)[:, None] * left_stride + r[None, :],
            mask=known_row[:, None] & known[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            right_ptr + expert.to(tl.int64) * right_expert + columns[None, :] * right_column + r[:, None] * right_rank,
            mask=known[:, None] & known_column[None, :], other=0.0,
        )  # fmt: skip
        acc = _add_product(acc, left, right, WIDE)
    to = out_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=known_row[:, None] & known_column[None, :])


def matmul(
    x: Tensor,
    weight: Tensor,
    groups: Groups,
    transposed: bool,
    low_rank: LowRankRows | None,
    tiles: Tiles | None = None,
) -> Tensor:
    x = unit_rows(x)
    n, k = (weight.shape[2], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[2])
    out = x.new_empty(x.shape[0], n)
    if not out.numel():
        return out
    weight = weight if weight.is_contiguous() else weight.contiguous()
    wide = is_wide(x)
    chosen = tiles or matmul_tiles(n, wide, few=x.shape[0] <= FEW_ROWS * groups.count)
    places = tile_map(groups, x.shape[0], chosen.rows)
    tma = not wide and _copies_tiles(x) and _tma_takes(x) and _tma_takes(weight)
    left, right, rank = x, x, 0
    strides = (0, 0, 0, 0)
    if low_rank is not None:
        left, right, rank = unit_rows(low_rank.left), low_rank.right, low_rank.left.shape[1]
        e, column, r = (0, 2, 1) if transposed else (0, 1, 2)
        strides = (left.stride(0), right.stride(e), right.stride(column), right.stride(r))
    _matmul[(places.shape[1] * triton.cdiv(n, chosen.columns),)](
        *_operands(x, weight, chosen, transposed, tma), out, left, right, places, places.shape[1],
        n, k, rank, x.stride(0), weight.shape[1], weight.shape[2], *strides,
        BM=chosen.rows, BN=chosen.columns, BK=chosen.inner,
        R=max(LEAST_RANK, triton.next_power_of_2(rank)) if rank else 0,
        TRANSPOSED=transposed, TMA=tma, WIDE=wide, num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    return out


def _operands(x: Tensor, weight: Tensor, tiles: Tiles, transposed: bool, tma: bool) -> tuple[object, object]:
    if not tma:
        return x, weight
    from triton.tools.tensor_descriptor import TensorDescriptor

    flat = weight.view(-1, weight.shape[2])
    block = [tiles.inner, tiles.columns] if transposed else [tiles.columns, tiles.inner]
    return (
        TensorDescriptor.from_tensor(x, [tiles.rows, tiles.inner]),
        TensorDescriptor.from_tensor(flat, block),
    )


@cache
def _capability(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


def _copies_tiles(x: Tensor) -> bool:
    """Whether the GPU has TMA."""
    return x.is_cuda and _capability(x.device.index or 0) >= 9


def _tma_takes(x: Tensor) -> bool:
    """TMA wants 16-byte addresses and strides."""
    return x.data_ptr() % 16 == 0 and x.stride(-2) * x.element_size() % 16 == 0


# --- sums over an expert's rows ------------------------------------------------------------------------------------


@triton.jit
def _outer(
    left_ptr, right_ptr, ends_ptr, out_ptr, m, n, left_stride, right_stride,
    BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out [E, m, n]: program (tile, e) sums over the rows of expert e."""
    expert, tiles_n = tl.program_id(1), tl.cdiv(n, BN)
    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    rows = (tl.program_id(0) // tiles_n) * BM + tl.arange(0, BM)
    columns = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(begin, end, BS):
        s = start + tl.arange(0, BS)
        known = s < end
        left = tl.load(
            left_ptr + s.to(tl.int64)[None, :] * left_stride + rows[:, None],
            mask=(rows < m)[:, None] & known[None, :], other=0.0,
        )  # fmt: skip
        right = tl.load(
            right_ptr + s.to(tl.int64)[:, None] * right_stride + columns[None, :],
            mask=known[:, None] & (columns < n)[None, :], other=0.0,
        )  # fmt: skip
        acc = _add_product(acc, left, right, WIDE)
    to = out_ptr + expert.to(tl.int64) * m * n + rows[:, None] * n + columns[None, :]
    tl.store(to, acc, mask=(rows < m)[:, None] & (columns < n)[None, :])


def outer(left: Tensor, right: Tensor, groups: Groups, tiles: Tiles | None = None) -> Tensor:
    left, right = unit_rows(left), unit_rows(right)
    m, n, wide = left.shape[1], right.shape[1], is_wide(left)
    out = torch.empty(groups.count, m, n, dtype=math_dtype(left.dtype), device=left.device)
    chosen = tiles or outer_tiles(m, n, wide)
    grid = (triton.cdiv(m, chosen.rows) * triton.cdiv(n, chosen.columns), groups.count)
    _outer[grid](
        left, right, groups.ends, out, m, n, left.stride(0), right.stride(0),
        BM=chosen.rows, BN=chosen.columns, BS=chosen.inner, WIDE=wide,
        num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    return out
