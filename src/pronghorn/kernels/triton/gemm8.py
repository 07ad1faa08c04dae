"""Products of 8-bit codes in Triton, scaled and added to in registers: see `kernels.int8`.

Two kernels of the same source for int8 and e4m3. Where the GPU copies tiles by itself (TMA: Hopper and later) each
program goes on from tile to tile, so that the next tile's codes arrive while this one's results are written; elsewhere
one program makes one tile and loads through pointers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pronghorn.kernels.lora import LowRank
from pronghorn.kernels.triton.launch import programs, unit_rows
from pronghorn.kernels.triton.lora import dot, is_wide


@triton.jit
def _tile(index, m, n, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile, in the order that keeps neighbours in time close in both."""
    tiles_m, tiles_n = tl.cdiv(m, BM), tl.cdiv(n, BN)
    group = index // (GROUP * tiles_n)
    first = group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = index - group * (GROUP * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def _finish(
    acc, rows, columns, row_ptr, column_ptr, residual_ptr, residual_stride, m, n, RESIDUAL: tl.constexpr
):  # fmt: skip
    """acc · scales + residual, in fp32."""
    out = acc.to(tl.float32) * tl.load(row_ptr + rows, mask=rows < m, other=0.0)[:, None]
    out = out * tl.load(column_ptr + columns, mask=columns < n, other=0.0)[None, :]
    if RESIDUAL:
        at = rows.to(tl.int64)[:, None] * residual_stride + columns[None, :]
        inside = (rows < m)[:, None] & (columns < n)[None, :]
        out += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return out


@triton.jit
def _part(
    acc, at_m, at_n, out_desc, xa_desc, b_desc, row_ptr, column_ptr, residual_ptr, residual_stride, scaling, m, n,
    BM: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    rows, columns = at_m + tl.arange(0, BM), at_n + tl.arange(0, WIDTH)
    out = _finish(acc, rows, columns, row_ptr, column_ptr, residual_ptr, residual_stride, m, n, RESIDUAL)
    if R:
        out += dot(xa_desc.load([at_m, 0]), b_desc.load([at_n, 0]).T, WIDE) * scaling
    out_desc.store([at_m, at_n], out.to(out_desc.dtype))


@triton.jit
def _gemm_tma(
    left_desc, right_desc, out_desc, xa_desc, b_desc, row_ptr, column_ptr, residual_ptr, residual_stride, scaling,
    m, n, k, programs,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    R: tl.constexpr, RESIDUAL: tl.constexpr, FLATTEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = tl.int32 if left_desc.dtype == tl.int8 else tl.float32
    tiles = tl.cdiv(m, BM) * tl.cdiv(n, BN)
    for index in tl.range(tl.program_id(0), tiles, programs, flatten=FLATTEN):
        tile_m, tile_n = _tile(index, m, n, BM, BN, GROUP)
        at_m, at_n = tile_m * BM, tile_n * BN
        acc = tl.zeros([BM, BN], kind)
        for step in range(tl.cdiv(k, BK)):
            left = left_desc.load([at_m, step * BK])
            right = right_desc.load([at_n, step * BK])
            acc = tl.dot(left, right.T, acc, out_dtype=kind)
        first, second = tl.reshape(acc, (BM, 2, BN // 2)).permute(0, 2, 1).split()
        _part(first, at_m, at_n, out_desc, xa_desc, b_desc, row_ptr, column_ptr, residual_ptr, residual_stride,
              scaling, m, n, BM, BN // 2, R, RESIDUAL, WIDE)  # fmt: skip
        _part(second, at_m, at_n + BN // 2, out_desc, xa_desc, b_desc, row_ptr, column_ptr, residual_ptr,
              residual_stride, scaling, m, n, BM, BN // 2, R, RESIDUAL, WIDE)  # fmt: skip


@triton.jit
def _gemm_pointers(
    left_ptr, right_ptr, out_ptr, xa_ptr, b_ptr, row_ptr, column_ptr, residual_ptr,
    left_stride, right_stride, out_stride, xa_stride, b_stride, residual_stride, scaling, m, n, k, rank,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr,
    RESIDUAL: tl.constexpr, INTEGER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    kind: tl.constexpr = tl.int32 if INTEGER else tl.float32
    tile_m, tile_n = _tile(tl.program_id(0), m, n, BM, BN, GROUP)
    rows, columns, inner = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows past the end read the first ones again: only what is stored needs a mask.
    left = left_ptr + (rows % m).to(tl.int64)[:, None] * left_stride + inner[None, :]
    right = right_ptr + (columns % n).to(tl.int64)[None, :] * right_stride + inner[:, None]
    acc = tl.zeros([BM, BN], kind)
    for step in range(tl.cdiv(k, BK)):
        rest = k - step * BK
        acc = tl.dot(
            tl.load(left, mask=inner[None, :] < rest, other=0.0),
            tl.load(right, mask=inner[:, None] < rest, other=0.0),
            acc,
            out_dtype=kind,
        )
        left += BK
        right += BK
    out = _finish(acc, rows, columns, row_ptr, column_ptr, residual_ptr, residual_stride, m, n, RESIDUAL)
    if R:
        at = tl.arange(0, R)
        xa = xa_ptr + rows.to(tl.int64)[:, None] * xa_stride + at[None, :]
        b = b_ptr + columns.to(tl.int64)[None, :] * b_stride + at[:, None]
        xa = tl.load(xa, mask=(rows < m)[:, None] & (at < rank)[None, :], other=0.0)
        b = tl.load(b, mask=(columns < n)[None, :] & (at < rank)[:, None], other=0.0)
        out += dot(xa, b, WIDE) * scaling
    to = out_ptr + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


class Call(NamedTuple):
    """A product's operands, checked and with stand-ins for what it lacks."""

    left: Tensor
    right: Tensor
    out: Tensor
    row_scales: Tensor
    column_scales: Tensor
    xa: Tensor | None
    b: Tensor | None
    scaling: float
    residual: Tensor | None

    @property
    def rank(self) -> int:
        """The adapter's rank in the kernel: 0 without one, else padded to what matrix units take."""
        return 0 if self.xa is None else max(16, triton.next_power_of_2(self.xa.shape[1]))

    @property
    def wide(self) -> bool:
        """Whether the adapter's product is made in fp32."""
        return self.xa is not None and is_wide(self.xa)

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.left.shape[0], self.right.shape[0], self.left.shape[1]

    def copies_tiles(self) -> bool:
        """Whether TMA takes the operands: rows that begin at multiples of 16 bytes."""
        given = [t for t in (self.left, self.right, self.out, self.xa, self.b, self.residual) if t is not None]
        return self.rank <= 64 and all(
            t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in given
        )


def product(
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor],
    low_rank: LowRank | None,
    residual: Tensor | None,
    out: Tensor,
) -> Tensor:
    (codes, row_scales), (others, column_scales) = left, right
    codes, others = unit_rows(codes), unit_rows(others)
    if low_rank is not None and (low_rank.scaling == 0 or low_rank.xa.shape[1] == 0):
        low_rank = None
    xa = b = None
    if low_rank is not None:
        xa, b = unit_rows(low_rank.xa), unit_rows(low_rank.b)
    scaling = 1.0 if low_rank is None else low_rank.scaling
    call = Call(
        codes, others, out, row_scales.contiguous(), column_scales.contiguous(), xa, b, scaling,
        None if residual is None else unit_rows(residual),
    )  # fmt: skip
    if out.numel():
        _choose(call)(call)
    return out


def _choose(call: Call) -> Callable[[Call], None]:
    if not call.left.is_cuda or not call.copies_tiles():
        return by_pointers
    major = torch.cuda.get_device_capability(call.left.device)[0]
    if (
        major == 9
        and call.out.dtype == torch.bfloat16
        and (call.xa is None or call.xa.dtype == torch.bfloat16)
    ):
        from pronghorn.kernels.triton.gemm8_hopper import run

        return run
    return by_tma if major >= 9 else by_pointers


def by_pointers(call: Call, rows: int = 128, columns: int = 128, inner: int = 64) -> None:
    m, n, k = call.sizes
    xa, b, residual = call.xa, call.b, call.residual
    _gemm_pointers[(triton.cdiv(m, rows) * triton.cdiv(n, columns),)](
        call.left, call.right, call.out, call.out if xa is None else xa, call.out if b is None else b,
        call.row_scales, call.column_scales, call.out if residual is None else residual,
        call.left.stride(0), call.right.stride(0), call.out.stride(0), 0 if xa is None else xa.stride(0),
        0 if b is None else b.stride(0), 0 if residual is None else residual.stride(0),
        call.scaling, m, n, k, 0 if xa is None else xa.shape[1],
        BM=rows, BN=columns, BK=inner, GROUP=8, R=call.rank, RESIDUAL=residual is not None,
        INTEGER=call.left.dtype == torch.int8, WIDE=call.wide,
        num_warps=8 if rows * columns > 8192 else 4, num_stages=4,
    )  # fmt: skip


def by_tma(
    call: Call, rows: int = 128, columns: int = 256, stages: int = 3, flatten: bool = False, group: int = 8
) -> None:
    m, n, k = call.sizes
    device, rank, half = call.left.device, max(call.rank, 16), columns // 2
    inner = 128 if call.left.is_cuda else 32
    tiles = triton.cdiv(m, rows) * triton.cdiv(n, columns)
    count = min(tiles, programs(tiles, device, 1))
    residual = call.residual
    _gemm_tma[(count,)](
        TensorDescriptor.from_tensor(call.left, [rows, inner]),
        TensorDescriptor.from_tensor(call.right, [columns, inner]),
        TensorDescriptor.from_tensor(call.out, [rows, half]),
        TensorDescriptor.from_tensor(call.out if call.xa is None else call.xa, [rows, rank]),
        TensorDescriptor.from_tensor(call.out if call.b is None else call.b, [half, rank]),
        call.row_scales, call.column_scales, call.out if residual is None else residual,
        0 if residual is None else residual.stride(0), call.scaling, m, n, k, count,
        BM=rows, BN=columns, BK=inner, GROUP=group, R=call.rank, RESIDUAL=residual is not None, FLATTEN=flatten,
        WIDE=call.wide,         num_warps=8, num_stages=stages,
    )  # fmt: skip
