"""Which experts a token goes to, with which weights, and the gradient of the weights.

    scores = softmax(logits) or σ(logits) [T, E];   the k highest are taken;   w = c · score / Σ score, or c · score

Sorted by expert, the T · k pairs of a token and an expert are the rows that the experts work on; an expert's rows are
in the order of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, math_dtype, use_triton
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

    def route(self, logits: Tensor, *, impl: Impl | None = None) -> Routing:
        """logits [T, E] -> the experts of each token and their weights, in fp32 (fp64 of fp64)."""
        if use_triton(logits, impl):
            from pronghorn.kernels.triton.routing import route

            return route(logits, self)
        values, indices = torch.topk(self._scores(logits), self.top_k, dim=-1)
        weights = (values / _total(values) if self.normalised else values) * self.scale
        return Routing.by_sorting(indices, weights, self.experts)

    def backward(
        self, dweights: Tensor, logits: Tensor, routing: Routing, *, impl: Impl | None = None
    ) -> Tensor:
        """Gradient of the logits [T, E] in fp32 from that of the rows' weights [S]."""
        if use_triton(logits, impl):
            from pronghorn.kernels.triton.routing import backward

            return backward(dweights, logits, routing, self)
        weights, chosen = routing.weights / self.scale, routing.indices
        grad = dweights[routing.places] * self.scale
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
        if self.kind == "softmax":
            return torch.softmax(logits, -1, dtype=wide)
        return torch.sigmoid(logits.to(wide))


def _total(values: Tensor) -> Tensor:
    """Σ over a token's experts, never zero."""
    return values.sum(-1, keepdim=True) + torch.finfo(values.dtype).tiny


@dataclass(frozen=True)
class Routing:
    """Experts and weights of the tokens, and the S = T · k rows that come of them, sorted by expert.

    Args:
        indices, weights: [T, k].
        groups: which of the sorted rows are whose.
        tokens: [S] the token of each row. `places`: [T, k] where the rows of each token are.
        row_weights: [S] the weight of each row.
    """

    indices: Tensor
    weights: Tensor
    groups: Groups
    tokens: Tensor
    places: Tensor
    row_weights: Tensor

    @staticmethod
    def by_sorting(indices: Tensor, weights: Tensor, count: int) -> Routing:
        """The rows of experts [T, k] with weights [T, k]."""
        experts, order = torch.sort(indices.reshape(-1), stable=True)
        numbers = torch.arange(order.numel(), device=order.device)
        places = torch.empty_like(order).scatter_(0, order, numbers).view(indices.shape)
        row_weights = weights.reshape(-1)[order]
        return Routing(
            indices, weights, Groups(experts, count), order // indices.shape[1], places, row_weights
        )
