"""Which experts a token goes to, with which weights, and the gradient of the weights.

    scores = softmax(logits) [T, E];   the k highest are taken;   w = score / Σ of the k scores, or score

Sorted by expert, the T · k pairs of a token and an expert are the rows that the experts work on; an expert's rows are
in the order of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, math_dtype, use_triton
from pronghorn.kernels.grouped_matmul import Groups


@dataclass(frozen=True)
class Scoring:
    """From logits to experts and weights.

    Args:
        normalised: the weights of a token add up to one.
    """

    experts: int
    top_k: int
    normalised: bool = True

    def route(self, logits: Tensor, *, impl: Impl | None = None) -> Routing:
        """logits [T, E] -> the experts of each token and their weights, in fp32 (fp64 of fp64)."""
        if use_triton(logits, impl):
            from pronghorn.kernels.triton.routing import route

            return route(logits, self)
        values, indices = torch.topk(_scores(logits), self.top_k, dim=-1)
        weights = values / values.sum(-1, keepdim=True) if self.normalised else values
        return Routing.by_sorting(indices, weights, self.experts)

    def backward(
        self, dweights: Tensor, logits: Tensor, routing: Routing, *, impl: Impl | None = None
    ) -> Tensor:
        """Gradient of the logits [T, E] in fp32 from that of the rows' weights [S]."""
        if use_triton(logits, impl):
            from pronghorn.kernels.triton.routing import backward

            return backward(dweights, logits, routing, self)
        weights, chosen = routing.weights, routing.indices
        grad = dweights[routing.places]
        inner = (grad * weights).sum(1, keepdim=True)
        if self.normalised:
            # The chosen softmax values over their sum are a softmax of the chosen logits.
            grad = weights * (grad - inner)
            return torch.zeros_like(logits, dtype=grad.dtype).scatter_(1, chosen, grad)
        return (-_scores(logits) * inner).scatter_add_(1, chosen, grad * weights)


def _scores(logits: Tensor) -> Tensor:
    return torch.softmax(logits, -1, dtype=math_dtype(logits.dtype))


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
