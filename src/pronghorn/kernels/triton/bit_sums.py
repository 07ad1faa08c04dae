"""Sums over words of memory in Triton: a program a piece, all tensors by their distance from the first."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _bit_sums(base_ptr, table_ptr, out_ptr, RUN: tl.constexpr, BLOCK: tl.constexpr):
    piece = tl.program_id(0).to(tl.int64)
    first = tl.load(table_ptr + piece * 4)
    rows = tl.load(table_ptr + piece * 4 + 1)
    stride = tl.load(table_ptr + piece * 4 + 2)
    words = tl.load(table_ptr + piece * 4 + 3)
    column = tl.arange(0, RUN).to(tl.int64)[None, :]
    total = tl.zeros([BLOCK, RUN], tl.int64)
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK).to(tl.int64)[:, None]
        place = row * stride + column
        inside = (row < rows) & (place < words)
        word = tl.load(base_ptr + first + place, mask=inside, other=0).to(tl.uint32, bitcast=True)
        word = word ^ (place.to(tl.uint32) * 0x9E3779B1)
        word = (word ^ (word >> 16)) * 0x85EBCA6B
        word = (word ^ (word >> 13)) * 0xC2B2AE35
        word = word ^ (word >> 16)
        total += tl.where(inside, word.to(tl.int64), 0)
    tl.store(out_ptr + piece, tl.sum(tl.sum(total, 1), 0))


def bit_sums(base: Tensor, table: Tensor, out: Tensor, run: int) -> None:
    """Fill out [P] for table [P, 4], whose first column counts words from `base`."""
    _bit_sums[(len(table),)](base, table, out, RUN=run, BLOCK=256, num_warps=4)
