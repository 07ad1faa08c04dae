"""An RMSNorm's parameters as the blocks need them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pronghorn.kernels.rms_norm import rms_norm_forward, rms_norm_forward_fp8
from pronghorn.weights import Operand


@dataclass(frozen=True)
class Norm:
    """y = x / rms(x) · (weight + offset); weight [H], `offset` is 1 for families that store w - 1."""

    weight: Tensor
    eps: float
    offset: float = 0.0

    def trainable(self) -> list[Tensor]:
        return [self.weight] if self.weight.requires_grad else []

    def forward(
        self, x: Tensor, dtype: torch.dtype, *, residual: Tensor | None = None, fp8: bool = False
    ) -> tuple[Operand, Tensor]:
        """The norm of x (+ residual) in `dtype`, with `fp8` quantised in the same pass, and what was normalised."""
        options = {"residual": residual, "weight_offset": self.offset, "out_dtype": dtype}
        if fp8:
            y, _, summed, rows = rms_norm_forward_fp8(x, self.weight, self.eps, **options)
            return Operand(y, rows), summed
        y, _, summed = rms_norm_forward(x, self.weight, self.eps, **options)
        return Operand(y), summed
