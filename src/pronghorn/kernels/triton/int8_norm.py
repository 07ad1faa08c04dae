"""RMSNorm in Triton, both ways, with its output in int8 beside it: see `kernels.int8`.

Rows are matrices of their blocks, [W / 64, 64], as in `int8.py`; codes are those of the rounded output, so that it
makes no difference whether these kernels make them or a later one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.int8 import rotation_of
from pronghorn.kernels.triton.int8 import largest_of, scale_of, store_codes, turned
from pronghorn.kernels.triton.launch import programs, unit_rows
from pronghorn.kernels.triton.lora import is_wide, limits


@triton.jit
def _sums(x, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """Sums [ROWS] of rows that have COUNT blocks each, x [ROWS · COUNT, LANES]."""
    return tl.sum(tl.reshape(tl.sum(x, 1), (ROWS, COUNT)), 1)


@triton.jit
def _spread(x, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """A number a row [ROWS] for its blocks [ROWS · COUNT, 1]."""
    return tl.reshape(tl.broadcast_to(x[:, None], (ROWS, COUNT)), (ROWS * COUNT,))[:, None]


@triton.jit
def _store_rows(
    codes_ptr, scales_ptr, x, start, rows, row, block, blocks,
    LANES: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Codes and scales of whole rows x [ROWS · COUNT, LANES], rounded."""
    wide = turned(x, LANES, True, WIDE)
    scale = scale_of(largest_of(wide, ROWS, COUNT), FACTOR)
    index = start + tl.arange(0, ROWS)
    tl.store(scales_ptr + index, scale, mask=index < rows)
    store_codes(codes_ptr, wide, scale, row, row < rows, block, blocks, FACTOR, ROWS, COUNT, LANES)


@triton.jit(do_not_specialize=["rows", "blocks", "programs"])
def _norm_forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, rstd_ptr, summed_ptr, codes_ptr, scales_ptr,
    x_stride, residual_stride, rows, blocks, programs, eps, weight_offset,
    HAS_RESIDUAL: tl.constexpr, LANES: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr,
    STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, ROWS * COUNT)
    block = index % COUNT
    width = blocks * LANES
    at = (block * LANES)[:, None] + tl.arange(0, LANES)[None, :]
    given = tl.load(weight_ptr + at, mask=(block < blocks)[:, None], other=0.0)
    for start in tl.range(tl.program_id(0) * ROWS, rows, programs * ROWS, num_stages=STAGES):
        row = (start + index // COUNT).to(tl.int64)
        inside = ((row < rows) & (block < blocks))[:, None]
        to = (row * width)[:, None] + at
        x = tl.load(x_ptr + (row * x_stride)[:, None] + at, mask=inside, other=0.0)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + (row * residual_stride)[:, None] + at, mask=inside, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(summed_ptr.dtype.element_ty)
            tl.store(summed_ptr + to, x, mask=inside)
        wide = x.to(tl.float32)
        rstd = 1.0 / tl.sqrt(_sums(wide * wide, ROWS, COUNT) / width + eps)
        each = start + tl.arange(0, ROWS)
        tl.store(rstd_ptr + each, rstd, mask=each < rows)
        y = wide * _spread(rstd, ROWS, COUNT) * (given.to(tl.float32) + weight_offset)
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + to, y, mask=inside)
        _store_rows(
            codes_ptr, scales_ptr, y, start, rows, row, block, blocks, LANES, FACTOR, ROWS, COUNT, WIDE
        )


@triton.jit(do_not_specialize=["rows", "blocks", "programs"])
def _norm_backward(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, residual_ptr, dx_ptr, codes_ptr, scales_ptr,
    dy_stride, x_stride, residual_stride, rows, blocks, programs, eps, weight_offset,
    HAS_RSTD: tl.constexpr, HAS_RESIDUAL: tl.constexpr, LANES: tl.constexpr, FACTOR: tl.constexpr, ROWS: tl.constexpr,
    COUNT: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    index = tl.arange(0, ROWS * COUNT)
    block = index % COUNT
    width = blocks * LANES
    at = (block * LANES)[:, None] + tl.arange(0, LANES)[None, :]
    given = tl.load(weight_ptr + at, mask=(block < blocks)[:, None], other=0.0)
    for start in tl.range(tl.program_id(0) * ROWS, rows, programs * ROWS, num_stages=STAGES):
        row = (start + index // COUNT).to(tl.int64)
        inside = ((row < rows) & (block < blocks))[:, None]
        x = tl.load(x_ptr + (row * x_stride)[:, None] + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + (row * dy_stride)[:, None] + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + (row * residual_stride)[:, None] + at, mask=inside, other=0.0)
        scaled = dy * (given.to(tl.float32) + weight_offset)
        if HAS_RSTD:
            each = start + tl.arange(0, ROWS)
            rstd = tl.load(rstd_ptr + each, mask=each < rows, other=0.0)
        else:
            rstd = 1.0 / tl.sqrt(_sums(x * x, ROWS, COUNT) / width + eps)
        along = _sums(scaled * x, ROWS, COUNT) * rstd * rstd / width
        dx = (scaled - x * _spread(along, ROWS, COUNT)) * _spread(rstd, ROWS, COUNT)
        if HAS_RESIDUAL:
            dx += residual.to(tl.float32)
        dx = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + (row * width)[:, None] + at, dx, mask=inside)
        _store_rows(
            codes_ptr, scales_ptr, dx, start, rows, row, block, blocks, LANES, FACTOR, ROWS, COUNT, WIDE
        )


#: numbers of a row that a program holds four tensors of; beyond, two kernels after each other are as fast
FITS = 4096


def holds(width: int) -> bool:
    """Whether these kernels take rows of so many numbers."""
    lanes = rotation_of(width)
    return lanes > 0 and max(triton.next_power_of_2(width // lanes), 16) * lanes <= FITS


def _launch(x: Tensor) -> tuple[dict[str, object], int]:
    """Constants, and the number of programs, for rows of x: three programs a processor is what registers allow."""
    rows, width = x.shape
    lanes = rotation_of(width)
    count = max(triton.next_power_of_2(width // lanes), 16)
    together = FITS // (lanes * count)
    # Two tensors' or three's next rows are on their way, twice, where that fits with three programs.
    plenty = limits(x.device)[1] >= 160 * 1024
    constants = {
        "LANES": lanes, "FACTOR": lanes**-0.5, "ROWS": together, "COUNT": count, "STAGES": 3 if plenty else 2,
        "WIDE": is_wide(x), "num_warps": 4,
    }  # fmt: skip
    return constants, programs(triton.cdiv(rows, together), x.device, 3)


def _codes(x: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return codes, torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)


def norm_forward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    x = unit_rows(x)
    rows, width = x.shape
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    summed = x if residual is None else torch.empty(rows, width, dtype=x.dtype, device=x.device)
    added = x if residual is None else unit_rows(residual)
    codes, scales = _codes(x)
    if rows:
        constants, count = _launch(x)
        _norm_forward[(count,)](
            x, added, weight, y, rstd, summed, codes, scales, x.stride(0), added.stride(0), rows,
            width // rotation_of(width), count, eps, weight_offset,
            HAS_RESIDUAL=residual is not None, **constants,
        )  # fmt: skip
    return y, rstd, summed, (codes, scales)


def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor | None,
    eps: float,
    weight_offset: float,
    residual_grad: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    dy, x = unit_rows(dy), unit_rows(x)
    residual = x if residual_grad is None else unit_rows(residual_grad)
    rows, width = x.shape
    dx = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    codes, scales = _codes(x)
    if rows:
        constants, count = _launch(x)
        _norm_backward[(count,)](
            dy, x, weight, scales if rstd is None else rstd, residual, dx, codes, scales,
            dy.stride(0), x.stride(0), residual.stride(0), rows, width // rotation_of(width), count, eps, weight_offset,
            HAS_RSTD=rstd is not None, HAS_RESIDUAL=residual_grad is not None, **constants,
        )  # fmt: skip
    return dx, (codes, scales)
