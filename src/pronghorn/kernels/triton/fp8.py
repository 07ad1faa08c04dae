"""Rows to e4m3 in Triton: a row in registers a program, one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.triton.launch import row_block, unit_rows

E4M3_MAX = tl.constexpr(448.0)
TINY = tl.constexpr(2.0**-100)


@triton.jit
def _quantise_rows(
    x_ptr, columns_ptr, codes_ptr, scales_ptr, x_stride, width, HAS_COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_COLUMNS:
        x = x * tl.load(columns_ptr + columns, mask=inside, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(x), 0) / E4M3_MAX, TINY)
    tl.store(scales_ptr + row, scale)
    tl.store(codes_ptr + row * width + columns, (x / scale).to(tl.float8e4nv), mask=inside)


def quantise_rows(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    x = unit_rows(x)
    rows, width = x.shape
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows:
        block, warps = row_block(width)
        _quantise_rows[(rows,)](
            x, x if columns is None else columns, codes, scales, x.stride(0), width,
            HAS_COLUMNS=columns is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return codes, scales
