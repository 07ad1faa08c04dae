"""What modules with quantised weights run when they are called by themselves."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class StoredModule(Protocol):
    """A module whose weight has to be computed."""

    def dense(self, dtype: torch.dtype | None = None) -> Tensor: ...


def dequantised_linear(x: Tensor, module: StoredModule, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b with the dequantised weight, in x's dtype or autocast's; differentiable in x (and b)."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y = _DequantisedProduct.apply(x, module)
    return y if bias is None else y + bias.to(y.dtype)


class _DequantisedProduct(torch.autograd.Function):
    """x @ Wᵀ that keeps nothing for backward: the weight is dequantised again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: StoredModule) -> Tensor:
        ctx.module = module
        return F.linear(x, module.dense(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy,) = grads
        return dy @ ctx.module.dense(dy.dtype), None
