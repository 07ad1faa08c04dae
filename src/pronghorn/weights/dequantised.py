"""Modules with quantised weights: what they run when they are called by themselves, and their way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pronghorn.weights.base import Weight


class StoredLinear(nn.Linear):
    """y = x Wᵀ + b with a frozen W that is stored as codes.

    Its own forward multiplies the dequantised weight in x's dtype, so that a model answers, falls back and merges as
    if it were loaded from 16 bits with these values; the blocks multiply the codes (`stored`).

    `compute_dtype` is the dtype the weight had.
    """

    compute_dtype: torch.dtype

    def stored(self) -> Weight:
        """The codes, as the blocks multiply them."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [out, in] in 16 or 32 bits."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """In input's dtype or autocast's; differentiable in input (and b)."""
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        y = _DequantisedProduct.apply(input, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def to_linear(self) -> nn.Linear:
        """The same module unquantised, in `compute_dtype`."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(self.dense(), requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)


class _DequantisedProduct(torch.autograd.Function):
    """x @ Wᵀ that keeps nothing for backward: the weight is dequantised again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: StoredLinear) -> Tensor:
        ctx.module = module
        return F.linear(x, module.dense(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy,) = grads
        return dy @ ctx.module.dense(dy.dtype), None
