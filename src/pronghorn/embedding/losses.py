"""Losses over the vectors of one batch. All are functions of cosines, computed in fp32 (fp64 for fp64 vectors).

Legend: a anchors [n, H], p their positives [n, H], q negatives [m, H], cos(x, y) = x·y / (‖x‖ ‖y‖).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

#: Losses of rows without scores, and of rows with them; the first of each is the default.
UNSCORED, SCORED = ("info_nce", "triplet"), ("cosent", "cosine")
LOSSES = (*UNSCORED, *SCORED)


def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    excluded: Tensor,
    scale: float,
    symmetric: bool = False,
) -> Tensor:
    """Every anchor is to find its positive among all candidates of the batch (van den Oord et al. 2018):

        loss = 1/n Σ_i −log softmax_j (scale · cos(a_i, c_j))_i        over the candidates that are not excluded for i

    Args:
        candidates: [n + m, H], the positives of all rows, then negatives.
        excluded: bool [n, n + m], candidates that belong to the anchor as well and must not count against it.
        scale: 1 / temperature.
        symmetric: the mean with the loss of the other direction, in which positives find their anchors.
    """
    cosines = scale * normalize(anchors, dim=-1) @ normalize(candidates, dim=-1).T
    cosines = cosines.masked_fill(excluded, float("-inf"))
    rows = torch.arange(len(anchors), device=anchors.device)
    loss = cross_entropy(cosines, rows)
    return (loss + cross_entropy(cosines[:, : len(anchors)].T, rows)) / 2 if symmetric else loss


def triplet(anchors: Tensor, positives: Tensor, negatives: Tensor, owners: Tensor, margin: float) -> Tensor:
    """mean over negatives q of row i:  max(0, cos(a_i, q) − cos(a_i, p_i) + margin).  `owners`: int64 [m], each i."""
    anchors, positives, negatives = (normalize(x, dim=-1) for x in (anchors, positives, negatives))
    own = anchors.index_select(0, owners)
    gap = (own * negatives).sum(-1) - (own * positives.index_select(0, owners)).sum(-1)
    return (gap + margin).clamp_min(0).mean()


def cosent(anchors: Tensor, positives: Tensor, scores: Tensor, scale: float) -> Tensor:
    """Pairs are to be as alike as their order of scores says (CoSENT, Su 2022):

    loss = log(1 + Σ over i, j with s_i > s_j of exp(scale · (cos_j − cos_i)))
    """
    cosines = scale * (normalize(anchors, dim=-1) * normalize(positives, dim=-1)).sum(-1)
    differences = cosines[None, :] - cosines[:, None]
    wrong = differences.masked_fill(scores[:, None] <= scores[None, :], float("-inf")).flatten()
    return torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong]), dim=0)


def cosine(anchors: Tensor, positives: Tensor, scores: Tensor) -> Tensor:
    """mean over pairs:  (cos_i − s_i)²."""
    cosines = (normalize(anchors, dim=-1) * normalize(positives, dim=-1)).sum(-1)
    return ((cosines - scores) ** 2).mean()


@dataclass(frozen=True)
class Objective:
    """A loss with its numbers. With `dims` it is the mean over the first d elements of all vectors for each d
    (Matryoshka, Kusupati et al. 2022), so that shortened vectors are good ones as well."""

    name: str
    scale: float = 20.0
    symmetric: bool = False
    margin: float = 0.2
    dims: Sequence[int] = ()

    @property
    def scored(self) -> bool:
        """Whether rows have scores."""
        return self.name in SCORED

    def __call__(self, vectors: Tensor, facts: Mapping[str, Any]) -> Tensor:
        """The loss of a batch: vectors [n + n + m, H] of anchors, positives and negatives; `facts` are those of
        `batches.facts_of`."""
        losses = [self._at(vectors[:, :dim], facts) for dim in self.dims or (vectors.shape[-1],)]
        return torch.stack(losses).mean()

    def _at(self, vectors: Tensor, facts: Mapping[str, Any]) -> Tensor:
        count = facts["rows"]
        anchors, candidates = vectors[:count], vectors[count:]
        positives, negatives = candidates[:count], candidates[count:]
        if self.name == "info_nce":
            return info_nce(anchors, candidates, facts["excluded"], self.scale, self.symmetric)
        if self.name == "triplet":
            return triplet(anchors, positives, negatives, facts["owners"], self.margin)
        scores = facts["scores"].to(vectors.dtype)
        if self.name == "cosent":
            return cosent(anchors, positives, scores, self.scale)
        return cosine(anchors, positives, scores)
