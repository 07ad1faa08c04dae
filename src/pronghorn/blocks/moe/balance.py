"""The auxiliary loss that keeps experts equally busy (Switch Transformer, arXiv 2101.03961), over all layers at once:

    L = E · Σ_e (c_e / n)(p_e / n),   c_e tokens sent to e,  p_e the sum of its probabilities,  n rows of all routers

Its gradient by a probability is E · c_e / n² for every token, which is known when all layers have run; so layers keep
nothing for it. Backward passes the loss first and leaves that gradient here, where each layer's backward finds it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pronghorn.kernels.dispatch import math_dtype


class RouterBalance:
    """What the routers of one forward pass did.

    Args:
        mask: [T] which tokens count, None for all of them.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        self.mask = mask
        self._counts: Tensor | None = None
        self._sums: Tensor | None = None
        self._rows: Tensor | float = 0.0
        self.gradient: Tensor | None = None

    def saw(self, logits: Tensor, indices: Tensor, at: slice) -> None:
        """A router's logits [t, E] and experts [t, k] of the tokens `at`."""
        probabilities = _probabilities(logits)
        if self._counts is None or self._sums is None:
            self._counts, self._sums = (probabilities.new_zeros(logits.shape[1]) for _ in range(2))
        weights = torch.ones_like(probabilities[:, :1]) if self.mask is None else self._of(at, probabilities)
        self._sums += (probabilities * weights).sum(0)
        self._counts.scatter_add_(0, indices.reshape(-1), weights.expand(indices.shape).reshape(-1))
        self._rows = self._rows + weights.sum()

    def loss(self) -> Tensor:
        """L as a 0-dim tensor without a graph."""
        assert self._counts is not None and self._sums is not None
        return (self._counts * self._sums).sum() * (self._counts.numel() / self._rows**2)

    def added_to(self, loss: Tensor, weight: Tensor | float) -> Tensor:
        """loss + weight · L; its backward leaves the gradient of the probabilities here."""
        return _AddBalance.apply(loss, self, weight)  # type: ignore[no-any-return]

    def logits_grad(self, logits: Tensor, at: slice) -> Tensor | None:
        """weight · dL/dlogits [t, E] of one router in backward; None where nobody added L to a loss."""
        if self.gradient is None:
            return None
        probabilities = _probabilities(logits)
        inner = probabilities @ self.gradient
        grad = probabilities * (self.gradient - inner[:, None])
        return grad if self.mask is None else grad * self._of(at, probabilities)

    def leave_gradient(self, scale: Tensor) -> None:
        """scale · E · c / n²."""
        assert self._counts is not None
        self.gradient = self._counts * (scale * (self._counts.numel() / self._rows**2))

    def _of(self, at: slice, like: Tensor) -> Tensor:
        assert self.mask is not None
        return self.mask[at, None].to(like.dtype)


def _probabilities(logits: Tensor) -> Tensor:
    return torch.softmax(logits, -1, dtype=math_dtype(logits.dtype))


class _AddBalance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, balance: RouterBalance, weight: Tensor | float) -> Tensor:
        ctx.balance, ctx.weight = balance, weight
        return loss + (weight * balance.loss()).to(loss.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.balance.leave_gradient(grads[0] * ctx.weight)
        return grads[0], None, None
