"""4-bit dequantisation in Triton, both levels of scales in one launch.

A program takes a run of 32-bit words of eight values each: a thread's eight results are one 16-byte store in 16 bits,
and its codes come with vector loads. What does not divide into whole words goes through a kernel that reads bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.nf4 import FourBits

#: Packed bytes a program of the byte kernel reads.
TILE_BYTES = 2048


@triton.jit
def block_scales(
    absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, known, blocksize2: tl.constexpr, NESTED: tl.constexpr
):  # fmt: skip
    if NESTED:
        quantised = tl.load(absmax_ptr + block, mask=known, other=0).to(tl.int32)
        coarse = tl.load(absmax2_ptr + block // blocksize2, mask=known, other=0.0)
        return tl.load(code2_ptr + quantised) * coarse + tl.load(offset_ptr)
    else:
        return tl.load(absmax_ptr + block, mask=known, other=0.0)


@triton.jit
def _dequantize_words(
    packed_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, out_ptr, words, blocks,
    blocksize2: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    WHOLE: tl.constexpr, BY_WORD: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of BLOCK_WORDS words, a scale each. WHOLE: every program's words exist."""
    WORDS: tl.constexpr = BLOCKS * BLOCK_WORDS
    first = tl.program_id(0) * BLOCKS
    start, word = first.to(tl.int64) * BLOCK_WORDS, tl.arange(0, WORDS)
    if BY_WORD:
        block = first + word // BLOCK_WORDS
        scale = block_scales(
            absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, block < blocks, blocksize2, NESTED
        )
    else:
        block = first + tl.arange(0, BLOCKS)
        scale = block_scales(
            absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, block < blocks, blocksize2, NESTED
        )
        scale = tl.reshape(tl.broadcast_to(scale[:, None], (BLOCKS, BLOCK_WORDS)), (WORDS,))
    if WHOLE:
        packed = tl.load(packed_ptr + start + word)
    else:
        packed = tl.load(packed_ptr + start + word, mask=word < words - start, other=0)
    # Value j of a word lies in byte j // 2, the even ones in its high half: bits 4, 0, 12, 8, 20, ...
    j = tl.arange(0, 8)
    nibble = (packed[:, None] >> ((j ^ 1) * 4)[None, :]) & 15
    if GATHER:
        table = tl.load(code_ptr + tl.arange(0, 16))
        looked_up = tl.reshape(tl.gather(table, tl.reshape(nibble, (WORDS * 8,)), 0), (WORDS, 8))
    else:  # sixteen fp32 numbers lie in one cache line, so that a warp's lookups are one transaction
        looked_up = tl.load(code_ptr + nibble)
    values = looked_up * scale[:, None]
    to = out_ptr + start * 8 + word[:, None] * 8 + j[None, :]
    if WHOLE:
        tl.store(to, values.to(out_ptr.dtype.element_ty))
    else:
        tl.store(to, values.to(out_ptr.dtype.element_ty), mask=(word < words - start)[:, None])


@triton.jit
def _dequantize_bytes(
    packed_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, out_ptr, size, blocks,
    blocksize2: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    scale = block_scales(
        absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, row, row < blocks, blocksize2, NESTED
    )
    at = row[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    packed = tl.load(packed_ptr + at, mask=2 * at < size, other=0).to(tl.int32)
    high = tl.load(code_ptr + (packed >> 4)) * scale[:, None]
    low = tl.load(code_ptr + (packed & 15)) * scale[:, None]
    values = tl.interleave(high, low)
    to = row[:, None] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
    tl.store(out_ptr + to, values.to(out_ptr.dtype.element_ty), mask=to < size)


def words_config() -> dict[str, Any]:
    """32-bit words a program takes: 8 a thread, 64 results each."""
    return {"WORDS": 1024, "BY_WORD": False, "GATHER": False, "num_warps": 4}


def dequantize(bits: FourBits, out: Tensor) -> Tensor:
    packed, blocksize, nested = bits.packed, bits.blocksize, bits.nested
    if not out.is_contiguous():
        raise ValueError("`out` must be contiguous")
    size = out.numel()
    if not size:
        return out
    code2, absmax2, offset, blocksize2 = bits.second
    pointers = (bits.absmax, bits.code, code2, absmax2, offset, out)
    blocks = triton.cdiv(size, blocksize)
    if size % 8 == 0 and blocksize >= 8 and packed.data_ptr() % 4 == 0 and packed.is_contiguous():
        config = dict(words_config())
        words, together = size // 8, max(config.pop("WORDS") * 8 // blocksize, 1)
        _dequantize_words[(triton.cdiv(blocks, together),)](
            packed.view(-1)[: 4 * words].view(torch.int32), *pointers, words, blocks, blocksize2=blocksize2,
            NESTED=nested is not None, BLOCKS=together, BLOCK_WORDS=blocksize // 8,
            WHOLE=words % (together * blocksize // 8) == 0, **config,
        )  # fmt: skip
        return out
    rows = max(TILE_BYTES // (blocksize // 2), 1)
    _dequantize_bytes[(triton.cdiv(blocks, rows),)](
        packed, *pointers, size, blocks,
        blocksize2=blocksize2, NESTED=nested is not None, ROWS=rows, BYTES=blocksize // 2, num_warps=8,
    )  # fmt: skip
    return out
