"""Dropout in Triton: the mask comes from the counter-based generator of Triton (Philox), never from memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _forward(x_ptr, y_ptr, size, p, seed, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.where(tl.rand(seed, at) >= p, x / (1.0 - p), 0.0)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def forward(x: Tensor, p: float, seed: int) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        _forward[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), p, seed, BLOCK=BLOCK, num_warps=4)
    return y
