"""Which experts a token goes to, with which weights, and the gradient of the weights.

    scores = softmax(logits) or σ(logits) [T, E];   the k highest are taken;   w = c · score / Σ score, or c · score

Sorted by expert, the T · k pairs of a token and an expert are the rows that the experts work on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import math_dtype
from pronghorn.kernels.grouped_matmul import Groups


@dataclass(frozen=True)
class Scoring:
    """From logits to experts and weights.

    Args:
        normalised: the weights of a token add up to `scale`.
        scale: c.
    """

    experts: int
    top_k: int
    kind: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    scale: float = 1.0

    def route(self, logits: Tensor) -> Routing:
        """logits [T, E] -> the experts of each token and their weights, in fp32 (fp64 of fp64)."""
        scores = self._scores(logits)
        values, experts = torch.topk(scores, self.top_k, dim=-1)
        return Routing(experts, self._weights(values), self.experts)

    def backward(self, dweights: Tensor, logits: Tensor, routing: Routing) -> Tensor:
        """Gradient of the logits [T, E] in fp32 from that of the weights [T, k]."""
        weights, chosen = routing.weights / self.scale, routing.indices
        grad = dweights * self.scale
        if self.kind == "softmax" and self.normalised:
            # The chosen softmax values over their sum are a softmax of the chosen logits.
            grad = weights * (grad - (grad * weights).sum(1, keepdim=True))
            return torch.zeros_like(logits, dtype=grad.dtype).scatter_(1, chosen, grad)
        scores = self._scores(logits)
        if self.kind == "sigmoid":
            taken = scores.gather(1, chosen)
            if self.normalised:
                grad = (grad - (grad * weights).sum(1, keepdim=True)) / _total(taken)
            return torch.zeros_like(scores).scatter_(1, chosen, grad * taken * (1 - taken))
        inner = (grad * weights).sum(1, keepdim=True)
        return (-scores * inner).scatter_add_(1, chosen, grad * weights)

    def _scores(self, logits: Tensor) -> Tensor:
        wide = math_dtype(logits.dtype)
        return (
            torch.softmax(logits, -1, dtype=wide)
            if self.kind == "softmax"
            else torch.sigmoid(logits.to(wide))
        )

    def _weights(self, values: Tensor) -> Tensor:
        return (values / _total(values) if self.normalised else values) * self.scale


def _total(values: Tensor) -> Tensor:
    """Σ over a token's experts, never zero."""
    return values.sum(-1, keepdim=True) + torch.finfo(values.dtype).tiny


@dataclass(frozen=True)
class Routing:
    """The experts `indices` [T, k] and their `weights` [T, k], and the rows that come of them, sorted by expert."""

    indices: Tensor
    weights: Tensor
    experts: int

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        experts, order = torch.sort(self.indices.reshape(-1), stable=True)
        return experts, order

    @cached_property
    def groups(self) -> Groups:
        """Which of the sorted rows are whose."""
        return Groups(self._sorted[0], self.experts)

    @cached_property
    def tokens(self) -> Tensor:
        """[S] the token of each sorted row."""
        return self._sorted[1] // self.indices.shape[1]

    @cached_property
    def places(self) -> Tensor:
        """[T, k] where the rows of each token are."""
        order = self._sorted[1]
        numbers = torch.arange(order.numel(), device=order.device)
        return torch.empty_like(order).scatter_(0, order, numbers).view(self.indices.shape)

    @cached_property
    def row_weights(self) -> Tensor:
        """[S] the weight of each sorted row."""
        return self.weights.reshape(-1)[self._sorted[1]]

    def by_token(self, rows: Tensor) -> Tensor:
        """A number of each sorted row [S] -> [T, k]."""
        return rows[self.places.view(-1)].view(self.indices.shape)
