"""4-bit weights to int8 codes in Triton: see `kernels.four_bit_int8`.

Numbers of the code lie within ±1, so that 16 bits of them lose 2^-12, a thirtieth of half a step; what a block or a
column is multiplied with comes after the product with ±1, or is chosen so that 16 bits hold it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.nf4 import FourBits
from pronghorn.kernels.triton.int8 import signs, to_codes
from pronghorn.kernels.triton.lora import dot, is_wide
from pronghorn.kernels.triton.nf4 import block_scales


@triton.jit
def _values(packed_ptr, code_ptr, at, inside):
    """Numbers of the code that bytes stand for, two a byte side by side, in fp32."""
    packed = tl.load(packed_ptr + at, mask=inside, other=0).to(tl.int32)
    return tl.interleave(tl.load(code_ptr + (packed >> 4)), tl.load(code_ptr + (packed & 15)))


@triton.jit
def _narrow(x, WIDE: tl.constexpr):
    return x if WIDE else x.to(tl.float16)


@triton.jit
def _within(x):
    """Codes of numbers whose scale may be theirs but for rounding."""
    return to_codes(tl.minimum(tl.maximum(x, -127.0), 127.0), 1.0)


@triton.jit(do_not_specialize=["blocks", "each"])
def _forward(
    packed_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, scales_ptr, out_ptr, blocks, each,
    blocksize: tl.constexpr, blocksize2: tl.constexpr, NESTED: tl.constexpr,
    LANES: tl.constexpr, FACTOR: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """COUNT of H's blocks a program, of `each` in a row; rows follow each other without a gap."""
    block = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    known = block < blocks
    at = (block * (LANES // 2))[:, None] + tl.arange(0, LANES // 2)[None, :]
    x = _values(packed_ptr, code_ptr, at, known[:, None])
    x = dot(_narrow(x, WIDE), signs(LANES, tl.float32 if WIDE else tl.float16), WIDE)
    scale = block_scales(
        absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block * LANES // blocksize, known, blocksize2, NESTED
    )
    factor = scale * FACTOR / tl.load(scales_ptr + block // each, mask=known, other=1.0)
    to = out_ptr + (block * LANES)[:, None] + tl.arange(0, LANES)[None, :]
    tl.store(to, _within(x * factor[:, None]), mask=known[:, None])


@triton.jit(do_not_specialize=["width"])
def _input_grad(
    packed_ptr, absmax_ptr, code_ptr, code2_ptr, absmax2_ptr, offset_ptr, scales_ptr, out_ptr, width, out_stride,
    blocksize: tl.constexpr, blocksize2: tl.constexpr, NESTED: tl.constexpr, LANES: tl.constexpr,
    FACTOR: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of H's rows and COLUMNS columns a program; RUN columns that follow each other share a scale."""
    row = tl.program_id(0) * LANES + tl.arange(0, LANES)
    first = tl.program_id(1) * COLUMNS
    start = row.to(tl.int64) * width
    byte = first // 2 + tl.arange(0, COLUMNS // 2)
    x = _values(packed_ptr, code_ptr, (start // 2)[:, None] + byte[None, :], (2 * byte < width)[None, :])
    run = first + tl.arange(0, COLUMNS // RUN) * RUN
    block = (start[:, None] + run[None, :]) // blocksize
    scale = block_scales(
        absmax_ptr, code2_ptr, absmax2_ptr, offset_ptr, block, (run < width)[None, :], blocksize2, NESTED
    )
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (LANES, COLUMNS // RUN, RUN)), (LANES, COLUMNS))
    column = first + tl.arange(0, COLUMNS)
    known = column < width
    # At most 127 · √LANES where a column holds one large number, and 16 bits hold every smaller one finely enough.
    x = x * scale / tl.load(scales_ptr + column, mask=known, other=1.0)[None, :]
    x = dot(signs(LANES, tl.float32 if WIDE else tl.float16), _narrow(x, WIDE), WIDE) * FACTOR
    to = out_ptr + column.to(tl.int64)[:, None] * out_stride + row[None, :]
    tl.store(to, tl.trans(_within(x)), mask=known[:, None])


def from_four_bit(bits: FourBits, scales: Tensor, input_grad: bool, lanes: int, out: Tensor) -> Tensor:
    rows, width = bits.shape
    if not out.numel():
        return out
    code2, absmax2, offset, blocksize2 = bits.second
    pointers = (bits.packed, bits.absmax, bits.code, code2, absmax2, offset, scales.contiguous(), out)
    constants = {
        "blocksize": bits.blocksize, "blocksize2": blocksize2, "NESTED": bits.nested is not None, "LANES": lanes,
        "FACTOR": lanes**-0.5, "WIDE": is_wide(bits.packed),
    }  # fmt: skip
    if input_grad:
        # A product of 16 rows whose right factor comes out of `interleave` is wrong in 16 bits (Triton 3.6, H200).
        constants["WIDE"] |= lanes == 16
        _input_grad[(rows // lanes, triton.cdiv(width, 128))](
            *pointers,
            width,
            out.stride(0),
            **constants,
            COLUMNS=128,
            RUN=64 if width % 64 == 0 else 16,
            num_warps=4,
        )
        return out
    if not out.is_contiguous():
        raise ValueError("rows of codes that are written must follow each other")
    blocks = rows * width // lanes
    _forward[(triton.cdiv(blocks, 64),)](
        *pointers, blocks, width // lanes, **constants, COUNT=64, num_warps=4
    )
    return out
