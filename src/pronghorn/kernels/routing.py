"""Which experts a token goes to, with which weights, and the gradient of the weights.

    scores = softmax(logits) or σ(logits) [T, E];   the k highest are taken;   w = c · score [/ Σ of the k scores]

Experts may stand in groups, of which the best come into question only (DeepSeek-V2, arXiv 2405.04434: those with the
highest score; V3, 2412.19437: the highest sum of two). A bias of the scores may decide who is taken, and no weight.

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
        normalised: the weights of a token add up to `scale`.
        sigmoid: scores are σ(logits), each on its own, not a softmax.
        scale: factor of the weights, c.
        groups: how many groups of neighbouring experts there are; `top_groups`: of how many a token's experts are.
        group_scores: the score of a group is the sum of so many of its highest.
        wide_logits: logits are formed in fp32, whatever the compute dtype is.
    """

    experts: int
    top_k: int
    normalised: bool = True
    sigmoid: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_scores: int = 1
    wide_logits: bool = False

    @property
    def limited(self) -> bool:
        """Whether groups keep experts from being taken."""
        return self.top_groups < self.groups

    def route(self, logits: Tensor, bias: Tensor | None = None, *, impl: Impl | None = None) -> Routing:
        """logits [T, E] -> the experts of each token and their weights, in fp32 (fp64 of fp64).

        Args:
            bias: [E], added to the scores for the choice alone.
        """
        if use_triton(logits, impl):
            from pronghorn.kernels.triton.routing import route

            return route(logits, self, bias)
        scores = self._scores(logits)
        wishes = scores if bias is None else scores + bias.detach().to(scores.dtype)
        if self.limited:
            wishes = wishes.masked_fill(~self._of_best_groups(wishes), float("-inf"))
        indices = torch.topk(wishes, self.top_k, dim=-1).indices
        values = scores.gather(1, indices)
        if self.normalised:
            values = values / values.sum(-1, keepdim=True)
        return Routing.by_sorting(indices, values * self.scale if self.scale != 1.0 else values, self.experts)

    def _of_best_groups(self, wishes: Tensor) -> Tensor:
        """Which experts [T, E] belong to a token's best groups."""
        apart = wishes.unflatten(1, (self.groups, -1))
        best = apart.topk(self.group_scores, dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
        chosen = torch.zeros(apart.shape[:2], dtype=torch.bool, device=wishes.device).scatter_(1, best, True)
        return chosen[:, :, None].expand(apart.shape).flatten(1)

    def _scores(self, logits: Tensor) -> Tensor:
        wide = logits.to(math_dtype(logits.dtype))
        return torch.sigmoid(wide) if self.sigmoid else torch.softmax(wide, -1)

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
        if not (self.normalised or self.sigmoid):
            return (-self._scores(logits) * inner).scatter_add_(1, chosen, grad * weights)
        # The chosen softmax values over their sum are a softmax of the chosen logits; σ' = σ (1 - σ).
        grad = weights * (grad - inner / self.scale if self.normalised else grad)
        if self.sigmoid:
            grad = grad * (1 - self._scores(logits).gather(1, chosen))
        return torch.zeros_like(logits, dtype=grad.dtype).scatter_(1, chosen, grad)


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
