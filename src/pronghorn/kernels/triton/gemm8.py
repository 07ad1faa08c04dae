"""Products of int8 codes in Triton, scaled and added to in registers: see `kernels.int8`.

The kernel here runs on every GPU: one program makes one tile and loads through pointers. Hopper's own, which most of
its rate needs, is in `gemm8_hopper.py`.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.lora import LowRank
from pronghorn.kernels.triton.launch import unit_rows
from pronghorn.kernels.triton.lora import dot, is_wide, limits, up

#: the largest rank that is added in the product's own pass
MOST_RANK = 64


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


@triton.jit(do_not_specialize=["m", "scaling"])
def _gemm(
    left_ptr, right_ptr, out_ptr, xa_ptr, b_ptr, row_ptr, column_ptr, residual_ptr,
    left_stride, right_stride, out_stride, xa_stride, b_stride, residual_stride, scaling, m, n, k, rank,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr,
    RESIDUAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _tile(tl.program_id(0), m, n, BM, BN, GROUP)
    rows, columns, inner = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows past the end read the first ones again: only what is stored needs a mask.
    left = left_ptr + (rows % m).to(tl.int64)[:, None] * left_stride + inner[None, :]
    right = right_ptr + (columns % n).to(tl.int64)[None, :] * right_stride + inner[:, None]
    acc = tl.zeros([BM, BN], tl.int32)
    for step in range(tl.cdiv(k, BK)):
        rest = k - step * BK
        acc = tl.dot(
            tl.load(left, mask=inner[None, :] < rest, other=0.0),
            tl.load(right, mask=inner[:, None] < rest, other=0.0),
            acc,
            out_dtype=tl.int32,
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
    """A product's operands."""

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
    def sizes(self) -> tuple[int, int, int]:
        return self.left.shape[0], self.right.shape[0], self.left.shape[1]

    def why_not_tiles(self) -> str | None:
        """Why tiles of these operands cannot be copied by TMA, which `gemm8_hopper` needs; None: they can."""
        added = [t for t in (self.xa, self.b, self.residual) if t is not None]
        if self.out.dtype not in (torch.bfloat16, torch.float16) or any(
            t.dtype != self.out.dtype for t in added
        ):
            return "results and what is added to them are not of one 16-bit dtype"
        if not all(_begins_at_16_bytes(t) for t in (self.left, self.right, self.out, *added)):
            return "rows do not begin at multiples of 16 bytes"
        return None


def _begins_at_16_bytes(x: Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


@cache
def why_not_hopper(index: int) -> str | None:
    """Why GPU `index` does not take the kernel of `gemm8_hopper`; None: it does."""
    capability = torch.cuda.get_device_capability(index)
    if capability != (9, 0):
        return f"compute capability {capability[0]}.{capability[1]} is not Hopper's 9.0"
    if find_spec("triton.experimental.gluon") is None:
        return f"Triton {triton.__version__} has no Gluon"
    return None


def product(
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor],
    low_rank: LowRank | None,
    residual: Tensor | None,
    out: Tensor,
) -> Tensor:
    (codes, row_scales), (others, column_scales) = left, right
    codes, others = unit_rows(codes), unit_rows(others)
    if not out.numel():
        return out
    if low_rank is not None and (low_rank.scaling == 0 or low_rank.xa.shape[1] == 0):
        low_rank = None
    later = low_rank if low_rank is not None and low_rank.xa.shape[1] > MOST_RANK else None
    xa = b = None
    if low_rank is not None and later is None:
        xa, b = _aligned(low_rank.xa), _aligned(low_rank.b)
    scaling = 1.0 if low_rank is None else low_rank.scaling
    call = Call(
        codes, others, out, row_scales.contiguous(), column_scales.contiguous(), xa, b, scaling,
        None if residual is None else unit_rows(residual),
    )  # fmt: skip
    few = call.sizes[0] <= 64
    if not few and codes.is_cuda and not why_not_hopper(codes.device.index or 0) and not call.why_not_tiles():
        from pronghorn.kernels.triton.gemm8_hopper import run

        run(call)
    else:
        by_pointers(call, *((16 if call.sizes[0] <= 16 else 64, 64) if few else ()))
    if later is not None:
        up(unit_rows(later.xa), [later.b], [later.scaling], [out], [], True)
    return out


def _aligned(x: Tensor) -> Tensor:
    """An adapter's factor [rows, R] with rows that begin at multiples of 16 bytes; copied where they do not."""
    x = unit_rows(x)
    if _begins_at_16_bytes(x):
        return x
    rank = x.shape[1]
    wide = x.new_empty(x.shape[0], -(-rank // 8) * 8)
    wide[:, :rank].copy_(x)
    return wide[:, :rank]


def by_pointers(call: Call, rows: int = 128, columns: int = 128) -> None:
    """Launch for any operands with unit stride along K and N."""
    m, n, k = call.sizes
    xa, b, residual = call.xa, call.b, call.residual
    room = (limits(call.left.device)[1] - 16 * 1024) // (rows + columns)
    inner = 128 if room >= 3 * 128 else 64
    stages = max(1, min(3 if inner == 128 else 4, room // inner))
    _gemm[(triton.cdiv(m, rows) * triton.cdiv(n, columns),)](
        call.left, call.right, call.out, call.out if xa is None else xa, call.out if b is None else b,
        call.row_scales, call.column_scales, call.out if residual is None else residual,
        call.left.stride(0), call.right.stride(0), call.out.stride(0), 0 if xa is None else xa.stride(0),
        0 if b is None else b.stride(0), 0 if residual is None else residual.stride(0),
        call.scaling, m, n, k, 0 if xa is None else xa.shape[1],
        BM=rows, BN=columns, BK=inner, GROUP=8, R=call.rank, RESIDUAL=residual is not None,
        WIDE=xa is not None and is_wide(xa), num_warps=8 if rows * columns > 8192 else 4, num_stages=stages,
    )  # fmt: skip
