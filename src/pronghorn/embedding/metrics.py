"""How good vectors are: retrieval among held-back documents, and rank correlation with scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: Ranks that are looked at; MRR and nDCG stop at the last one.
TOP = (1, 10)


def retrieval(queries: Tensor, documents: Tensor, relevant: Sequence[set[int]]) -> Mapping[str, float]:
    """Means over queries, each of whose relevant documents are given by their numbers.

        recall@k  share of the relevant ones among the k nearest (of k at most)
        mrr@10    1 / rank of the first relevant one, 0 beyond 10
        ndcg@10   Σ over relevant ones at rank r ≤ 10 of 1 / log2(r + 1), by its largest possible value

    Args:
        queries: [n, H] and documents: [m, H], of length one; the nearest has the largest product.
    """
    last = TOP[-1]
    nearest = [
        (part @ documents.T).topk(min(last, len(documents)), dim=-1).indices.tolist()
        for part in queries.split(1024)
    ]
    totals = dict.fromkeys([*(f"recall@{k}" for k in TOP), f"mrr@{last}", f"ndcg@{last}"], 0.0)
    discounts = [1 / torch.log2(torch.tensor(rank + 2.0)).item() for rank in range(last)]
    for found, wanted in zip((row for part in nearest for row in part), relevant, strict=True):
        ranks = [rank for rank, document in enumerate(found) if document in wanted]
        for k in TOP:
            totals[f"recall@{k}"] += sum(rank < k for rank in ranks) / min(len(wanted), k)
        if ranks:
            totals[f"mrr@{last}"] += 1 / (ranks[0] + 1)
            best = sum(discounts[: len(wanted)])
            totals[f"ndcg@{last}"] += sum(discounts[rank] for rank in ranks) / best
    return {name: total / max(len(queries), 1) for name, total in totals.items()}


def spearman(found: Tensor, scores: Tensor) -> float:
    """Rank correlation of two [n] tensors, ties sharing their mean rank; 0 where either does not vary."""
    a, b = (_ranks(values.double().cpu()) for values in (found, scores))
    a, b = a - a.mean(), b - b.mean()
    spread = float(a.norm() * b.norm())
    return float(a @ b) / spread if spread else 0.0


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]
