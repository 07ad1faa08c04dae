"""Dequantisation of bitsandbytes' 4-bit weights (NF4: Dettmers et al. 2023, arXiv 2305.14314).

Two values share a byte, the first in the high nibble; `code` maps a nibble to a number, and every `blocksize`
consecutive values share a scale:

    w[i] = code[nibble[i]] · absmax[i // blocksize]

With double quantisation the scales are themselves 8-bit codes, in blocks of `blocksize2`:

    absmax[j] = code2[q[j]] · absmax2[j // blocksize2] + offset
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, use_triton

# (code2 fp32 [256], absmax2 fp32, offset: fp32 scalar tensor, blocksize2)
Nested = tuple[Tensor, Tensor, Tensor, int]


class FourBits(NamedTuple):
    """A weight of `shape` in this layout.

    packed: uint8, numel(shape) / 2 bytes (rounded up). absmax: fp32 [blocks], or uint8 codes with `nested`.
    code: fp32 [16].
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    blocksize: int
    shape: tuple[int, int]
    nested: Nested | None = None

    @property
    def second(self) -> Nested:
        """The scales' scales as kernels take them: something in their place where there are none."""
        return self.nested or (self.code, self.code, self.code, 1)

    def block_scales(self) -> Tensor:
        """fp32 [blocks]."""
        if self.nested is None:
            return self.absmax.view(-1)
        code2, absmax2, offset, blocksize2 = self.nested
        coarse = absmax2.repeat_interleave(blocksize2)[: self.absmax.numel()]
        return code2.index_select(0, self.absmax.view(-1).int()) * coarse + offset


def dequantize_4bit(
    bits: FourBits, dtype: torch.dtype, *, out: Tensor | None = None, impl: Impl | None = None
) -> Tensor:
    """The weight [shape] in `dtype`; scales of a doubly quantised weight are expanded in the same launch.

    Args:
        out: contiguous buffer to write into.
    """
    packed, blocksize = bits.packed, bits.blocksize
    if out is None:
        out = torch.empty(bits.shape, dtype=dtype, device=packed.device)
    if use_triton(packed, impl):
        from pronghorn.kernels.triton.nf4 import dequantize

        return dequantize(bits, out)
    absmax, size = bits.block_scales(), math.prod(bits.shape)
    nibbles = torch.empty(packed.numel(), 2, dtype=torch.int32, device=packed.device)
    nibbles[:, 0] = packed.view(-1) >> 4
    nibbles[:, 1] = packed.view(-1) & 15
    values = bits.code.index_select(0, nibbles.view(-1))[:size]
    whole = size // blocksize * blocksize
    values[:whole].view(-1, blocksize).mul_(absmax[: whole // blocksize, None])
    if whole < size:
        values[whole:].mul_(absmax[-1])
    return out.copy_(values.view(bits.shape))
