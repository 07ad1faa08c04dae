"""Comparison of kernels with fp64 oracles."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels.nf4 import FourBits, dequantize_4bit
from pronghorn.weights.quantised import FourBitWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLS = ("torch", "triton")

# fp32 arithmetic over rows of a few hundred elements, then one rounding to nearest: half a unit in the last place,
# doubled because a value just off a tie may fall either way.
# Triton's interpreter cuts fp32 to bf16 instead of rounding it, which doubles that error.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RELATIVE = {
    torch.float64: 1e-12,
    torch.float32: 4e-6,
    torch.bfloat16: 2**-7 if INTERPRETED else 2**-8,
    torch.float16: 2**-11,
}


def random(
    *shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float = 1.0
) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def four_bits(
    weight: Tensor, blocksize: int = 64, kind: str = "nf4", double: bool = True
) -> tuple[FourBits, Any, Tensor]:
    """A weight as bitsandbytes quantises it, bitsandbytes' state, and the weight that it stands for in fp64."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=blocksize, quant_type=kind, compress_statistics=double)
    bits = FourBitWeight(packed, state).bits
    return bits, state, dequantize_4bit(bits, torch.float64, impl="torch")


def assert_near(actual: Tensor, expected: Tensor, *, slack: float = 1.0) -> None:
    """|actual - expected| ≤ slack · (u · |expected| + 4e-6 · max|expected|), u of actual's dtype.

    The second term is cancellation: a small result of large terms carries the fp32 error of the large ones.
    """
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs()
    scale = expected.double().abs()
    absolute = 4e-6 if actual.dtype != torch.float64 else 1e-12
    bound = slack * (RELATIVE[actual.dtype] * scale + absolute * scale.max().clamp(min=1e-6))
    if actual.dtype == torch.float16:
        bound += 2**-24  # its smallest subnormal
    assert not actual.isnan().any(), "NaN: memory that nobody wrote, or a wrong formula"
    assert (difference <= bound).all(), f"off by {(difference / bound).max():.2f} times the bound"
