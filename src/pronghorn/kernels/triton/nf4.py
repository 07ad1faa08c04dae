"""4-bit dequantisation in Triton: a tile of quantisation blocks a program, both levels of scales in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Packed bytes a program reads: 2,048 (4,096 values) is 16 values a thread with 8 warps.
TILE_BYTES = 2048


@triton.jit
def _dequantize(
    packed_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, out_ptr, size, blocks,
    blocksize2: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < blocks
    if NESTED:
        quantised = tl.load(absmax_ptr + row, mask=known, other=0).to(tl.int32)
        coarse = tl.load(absmax2_ptr + row // blocksize2, mask=known, other=0.0)
        scale = tl.load(code2_ptr + quantised) * coarse + tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + row, mask=known, other=0.0)
    at = row[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    packed = tl.load(packed_ptr + at, mask=2 * at < size, other=0).to(tl.int32)
    # Sixteen fp32 numbers lie in one cache line, so that a warp's lookups are one transaction.
    high = tl.load(code_ptr + (packed >> 4)) * scale[:, None]
    low = tl.load(code_ptr + (packed & 15)) * scale[:, None]
    values = tl.interleave(high, low)
    to = row[:, None] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
    tl.store(out_ptr + to, values.to(out_ptr.dtype.element_ty), mask=to < size)


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    nested: tuple[Tensor, Tensor, Tensor, int] | None,
    out: Tensor,
) -> Tensor:
    if not out.is_contiguous():
        raise ValueError("`out` must be contiguous")
    size = out.numel()
    blocks = triton.cdiv(size, blocksize)
    code2, absmax2, offset, blocksize2 = nested if nested is not None else (code, code, code, 1)
    rows = max(TILE_BYTES // (blocksize // 2), 1)
    if size:
        _dequantize[(triton.cdiv(blocks, rows),)](
            packed, absmax, code, code2, absmax2, offset, out, size, blocks,
            blocksize2=blocksize2, NESTED=nested is not None, ROWS=rows, BYTES=blocksize // 2, num_warps=8,
        )  # fmt: skip
    return out
