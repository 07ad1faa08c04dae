"""Dequantisation of bitsandbytes' 4-bit weights (NF4: Dettmers et al. 2023, arXiv 2305.14314).

Two values share a byte, the first in the high nibble; `code` maps a nibble to a number, and every `blocksize`
consecutive values share a scale:

    w[i] = code[nibble[i]] · absmax[i // blocksize]

With double quantisation the scales are themselves 8-bit codes, in blocks of `blocksize2`:

    absmax[j] = code2[q[j]] · absmax2[j // blocksize2] + offset
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, use_triton

# (code2 fp32 [256], absmax2 fp32, offset: fp32 scalar tensor, blocksize2)
Nested = tuple[Tensor, Tensor, Tensor, int]


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    *,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    nested: Nested | None = None,
    out: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """The weight [shape] in `dtype`; scales of a doubly quantised weight are expanded in the same launch.

    Args:
        packed: uint8, numel(shape) / 2 bytes (rounded up). absmax: fp32 [blocks], or uint8 codes with `nested`.
        code: fp32 [16]. out: contiguous buffer to write into.
    """
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    if use_triton(packed, impl):
        from pronghorn.kernels.triton.nf4 import dequantize

        return dequantize(packed, absmax, code, blocksize, nested, out)
    if nested is not None:
        absmax = _expand_scales(absmax, *nested)
    size = math.prod(shape)
    nibbles = torch.empty(packed.numel(), 2, dtype=torch.int32, device=packed.device)
    nibbles[:, 0] = packed.view(-1) >> 4
    nibbles[:, 1] = packed.view(-1) & 15
    values = code.index_select(0, nibbles.view(-1))[:size]
    whole = size // blocksize * blocksize
    values[:whole].view(-1, blocksize).mul_(absmax.view(-1)[: whole // blocksize, None])
    if whole < size:
        values[whole:].mul_(absmax.view(-1)[-1])
    return out.copy_(values.view(shape))


def _expand_scales(codes: Tensor, code2: Tensor, absmax2: Tensor, offset: Tensor, blocksize2: int) -> Tensor:
    coarse = absmax2.repeat_interleave(blocksize2)[: codes.numel()]
    return code2.index_select(0, codes.view(-1).int()) * coarse + offset
