"""Rows to int8 codes in Triton, in one pass over memory: see `kernels.int8`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.triton.launch import row_block, unit_rows

TINY = tl.constexpr(2.0**-100)
# fp32 holds integers only from this on, so that adding it rounds to the nearest, ties to even.
WHOLE = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def to_codes(x, scale):
    """rint(x / scale) as int8 for |x| <= 127 scales."""
    return ((x / scale + WHOLE) - WHOLE).to(tl.int32).to(tl.int8)


@triton.jit
def _quantise_rows(
    x_ptr, columns_ptr, codes_ptr, scales_ptr, x_stride, width, HAS_COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_COLUMNS:
        x = x * tl.load(columns_ptr + columns, mask=inside, other=0.0)
    # `tl.max` passes over NaN; the sum does not.
    scale = tl.maximum(tl.max(tl.abs(x), 0) / 127.0, TINY) + 0.0 * tl.sum(x, 0)
    tl.store(scales_ptr + row, scale)
    tl.store(codes_ptr + row * width + columns, to_codes(x, scale), mask=inside)


def quantise_rows(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    x = unit_rows(x)
    rows, width = x.shape
    codes = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows:
        block, warps = row_block(width)
        _quantise_rows[(rows,)](
            x, x if columns is None else columns, codes, scales, x.stride(0), width,
            HAS_COLUMNS=columns is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return codes, scales
