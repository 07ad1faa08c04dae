"""LayerNorm in Triton: one row in registers a program, one pass over memory each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.triton.launch import programs, row_block, unit_rows


@triton.jit
def _centred(x_ptr, columns, inside, width, eps):
    """A row without its mean, and what it is divided by, fp32."""
    x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    # Two passes over registers: the square of a row's mean may be much larger than its variance.
    x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    return x, 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)


@triton.jit
def _forward(x_ptr, weight_ptr, y_ptr, x_stride, groups, width, eps, BLOCK: tl.constexpr):
    index = tl.program_id(0)
    row = index.to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x, rstd = _centred(x_ptr + row * x_stride, columns, inside, width, eps)
    weight = tl.load(weight_ptr + (index % groups) * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + columns, (x * rstd * weight).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _two_sums(a, b, c, d):
    return a + c, b + d


@triton.jit
def _backward(
    dy_ptr, x_ptr, weight_ptr, residual_ptr, dx_ptr, partial_ptr, dy_stride, x_stride, residual_stride,
    rows, groups, width, eps,
    HAS_RESIDUAL: tl.constexpr, NEED_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    # The number of programs is a multiple of the groups, so that all rows of one take the same weight.
    weight = tl.load(weight_ptr + (first % groups) * width + columns, mask=inside, other=0.0).to(tl.float32)
    partial = tl.zeros([BLOCK], tl.float32)
    for index in range(first, rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:  # asked for before the sums, so that nothing waits for it after them
            residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
        x, rstd = _centred(x_ptr + row * x_stride, columns, inside, width, eps)
        normed = x * rstd
        if NEED_WEIGHT:
            partial += dy * normed
        scaled = dy * weight
        total, along = tl.reduce((scaled, scaled * normed), 0, _two_sums)
        dx = (scaled - total / width - normed * (along / width)) * rstd
        if HAS_RESIDUAL:
            dx += residual.to(tl.float32)
        tl.store(dx_ptr + row * width + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if NEED_WEIGHT:
        tl.store(partial_ptr + first.to(tl.int64) * width + columns, partial, mask=inside)


def forward(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    x, weight = unit_rows(x), weight.contiguous()
    rows, width = x.shape
    y = torch.empty(rows, width, dtype=out_dtype, device=x.device)
    if rows:
        block, warps = row_block(width)
        groups = weight.numel() // width
        _forward[(rows,)](x, weight, y, x.stride(0), groups, width, eps, BLOCK=block, num_warps=warps)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual_grad: Tensor | None,
    need_weight_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """dx, dweight."""
    dy, x, weight = unit_rows(dy), unit_rows(x), weight.contiguous()
    residual = x if residual_grad is None else unit_rows(residual_grad)
    rows, width = x.shape
    dx = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    block, warps = row_block(width)
    groups = weight.numel() // width
    # Programs that loop keep one partial weight gradient each; without it a program a row hides latency better.
    count = max(rows, 1)
    if need_weight_grad:
        count = triton.cdiv(programs(rows, x.device, 4), groups) * groups
    partial = torch.zeros(count if need_weight_grad else 0, width, dtype=torch.float32, device=x.device)
    if rows:
        _backward[(count,)](
            dy, x, weight, residual, dx, partial, dy.stride(0), x.stride(0), residual.stride(0),
            rows, groups, width, eps,
            HAS_RESIDUAL=residual_grad is not None, NEED_WEIGHT=need_weight_grad, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return dx, partial.view(-1, *weight.shape).sum(0) if need_weight_grad else None
