"""Dropout whose mask is a pure function of a seed, so that backward draws it again instead of keeping it."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, use_triton

# The counter of the Triton generator is a 32-bit integer, and the last program counts up to a whole block.
LARGEST = 2**31 - 1024


def seeded_dropout(x: Tensor, p: float, seed: int, *, impl: Impl | None = None) -> Tensor:
    """x · mask / (1 - p); each element is kept with probability 1 - p. Same seed, shape and device: same mask."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"the dropout probability must be in [0, 1), not {p}")
    if p == 0.0:
        return x
    if use_triton(x, impl) and x.numel() <= LARGEST:
        from pronghorn.kernels.triton.dropout import forward

        return forward(x, p, seed)
    generator = torch.Generator(x.device).manual_seed(seed)
    kept = torch.rand(x.shape, generator=generator, device=x.device) >= p
    # Scaled as a number: a scale in the mask would be rounded to x's dtype, the same way for every element.
    return (x * kept).mul_(1.0 / (1.0 - p))
