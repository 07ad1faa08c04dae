"""RMSNorm in Triton: one row in registers a program, one pass over memory each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.triton.fp8 import column_factors, inverse, row_scale
from pronghorn.kernels.triton.launch import (
    FEW_ROWS,
    dependent_launch,
    launch_next,
    programs,
    row_block,
    unit_rows,
    wait_for_last,
)


@triton.jit
def _forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, rstd_ptr, summed_ptr, codes_ptr, scales_ptr,
    x_stride, residual_stride, width, eps, weight_offset,
    HAS_RESIDUAL: tl.constexpr, QUANTISE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    if PDL:
        launch_next()
        wait_for_last()
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
        # The rounded sum is what the rest of the model sees, so it is what gets normalised.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + row * width + columns, x, mask=inside)
    wide = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / width + eps)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + weight_offset
    y = (wide * rstd * weight).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * width + columns, y, mask=inside)
    if QUANTISE:
        # Of the rounded output, so that it makes no difference whether this kernel quantises or a later one.
        rounded = y.to(tl.float32)
        scale = row_scale(rounded)
        tl.store(scales_ptr + row, scale)
        tl.store(codes_ptr + row * width + columns, (rounded * inverse(scale)).to(tl.float8e4nv), mask=inside)


@triton.jit
def _two_sums(a, b, c, d):
    return a + c, b + d


@triton.jit
def _backward(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, residual_ptr, dx_ptr, partial_ptr, codes_ptr, scales_ptr, columns_ptr,
    dy_stride, x_stride, residual_stride, rows, width, eps, weight_offset,
    HAS_RSTD: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NEED_WEIGHT: tl.constexpr, QUANTISE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    step = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + weight_offset
    partial = tl.zeros([BLOCK], tl.float32)
    for index in range(first, rows, step):
        row = tl.cast(index, tl.int64)
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:  # asked for before the sums, so that nothing waits for it after them
            residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
        scaled = dy * weight
        if HAS_RSTD:
            rstd = tl.load(rstd_ptr + row)
            along = tl.sum(scaled * x, 0)
        else:
            square, along = tl.reduce((x * x, scaled * x), 0, _two_sums)
            rstd = 1.0 / tl.sqrt(square / width + eps)
        normed = x * rstd
        if NEED_WEIGHT:
            partial += dy * normed
        dx = (scaled - normed * (along * rstd / width)) * rstd
        if HAS_RESIDUAL:
            dx += residual.to(tl.float32)
        dx = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + row * width + columns, dx, mask=inside)
        if QUANTISE:
            rounded = dx.to(tl.float32) * column_factors(columns_ptr, columns, inside)
            scale = row_scale(rounded)
            tl.store(scales_ptr + row, scale)
            tl.store(
                codes_ptr + row * width + columns, (rounded * inverse(scale)).to(tl.float8e4nv), mask=inside
            )
    if NEED_WEIGHT:
        tl.store(partial_ptr + first.to(tl.int64) * width + columns, partial, mask=inside)


def forward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    weight_offset: float,
    out_dtype: torch.dtype,
    fp8: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, rstd, summed; `fp8` are buffers for y's codes [T, H] and row scales."""
    x = unit_rows(x)
    rows, width = x.shape
    y = torch.empty(rows, width, dtype=out_dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    summed = x if residual is None else torch.empty(rows, width, dtype=x.dtype, device=x.device)
    added = x if residual is None else unit_rows(residual)
    codes, scales = (y, rstd) if fp8 is None else fp8
    if rows:
        block, warps = row_block(width)
        pdl = dependent_launch(x.device) if rows <= FEW_ROWS else {}
        _forward[(rows,)](
            x, added, weight, y, rstd, summed, codes, scales,
            x.stride(0), added.stride(0), width, eps, weight_offset,
            HAS_RESIDUAL=residual is not None, QUANTISE=fp8 is not None, BLOCK=block, PDL=bool(pdl), num_warps=warps,
            **pdl,
        )  # fmt: skip
    return y, rstd, summed


def backward_config(width: int, alone: bool = False) -> tuple[int, int]:
    """(block, warps) of the backward; `alone`: without the gradient of the weight (8B: 64.1 µs by four warps, 65.7 by
    eight)."""
    block, warps = row_block(width)
    return block, min(warps, 4) if alone and block <= 4096 else warps


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor | None,
    eps: float,
    weight_offset: float,
    residual_grad: Tensor | None,
    need_weight_grad: bool,
    fp8: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx, dweight; `fp8` are buffers for the codes [T, H] and row scales of dx · columns, and the columns' factors."""
    dy, x = unit_rows(dy), unit_rows(x)
    residual = x if residual_grad is None else unit_rows(residual_grad)
    rows, width = x.shape
    dx = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    block, warps = backward_config(width, alone=not need_weight_grad)
    # Programs that loop keep one partial weight gradient each; without it a program a row hides latency better.
    count = programs(rows, x.device, 4) if need_weight_grad else max(rows, 1)
    partial = torch.zeros(count if need_weight_grad else 0, width, dtype=torch.float32, device=x.device)
    codes, scales, columns = (dx, dx, dx) if fp8 is None else fp8
    if rows:
        _backward[(count,)](
            dy, x, weight, dx if rstd is None else rstd, residual, dx, partial, codes, scales, columns,
            dy.stride(0), x.stride(0), residual.stride(0), rows, width, eps, weight_offset,
            HAS_RSTD=rstd is not None, HAS_RESIDUAL=residual_grad is not None, NEED_WEIGHT=need_weight_grad,
            QUANTISE=fp8 is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dx, partial.sum(0) if need_weight_grad else None
