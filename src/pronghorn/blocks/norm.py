"""An RMSNorm's parameters as the blocks need them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """y = x / rms(x) · (weight + offset); weight [H], `offset` is 1 for families that store w - 1."""

    weight: Tensor
    eps: float
    offset: float = 0.0

    def trainable(self) -> list[Tensor]:
        return [self.weight] if self.weight.requires_grad else []
