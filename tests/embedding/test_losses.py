"""Losses against their definitions, what is left out of them, and the figures of an evaluation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from pronghorn.embedding.batches import TokenPair, facts_of
from pronghorn.embedding.losses import Objective, cosent, info_nce, triplet
from pronghorn.embedding.metrics import retrieval, spearman


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def row(*keys: int, score: float | None = None) -> TokenPair:
    return TokenPair(tuple(np.array([key], dtype=np.int32) for key in keys), keys, score)


def cosines(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return cosine_similarity(left[:, None], right[None], dim=-1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce_is_its_definition(symmetric: bool) -> None:
    rows = [row(0, 10, 20), row(1, 11), row(2, 12, 21, 22)]
    given, n = vectors(9, 8), 3
    table = torch.exp(7.0 * cosines(given[:n], given[n:]))
    expected = -sum(math.log(table[i, i] / table[i].sum()) for i in range(n)) / n
    if symmetric:
        back = -sum(math.log(table[i, i] / table[:, i].sum()) for i in range(n)) / n
        expected = (expected + back) / 2
    found = Objective("info_nce", scale=7.0, symmetric=symmetric)(given, facts_of(rows))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_texts_that_belong_to_an_anchor_do_not_count_against_it() -> None:
    # Rows 0 and 1 share their positive, rows 0 and 2 their anchor; a negative of row 3 is row 0's positive, and another
    # is row 3's own anchor.
    rows = [row(0, 10), row(1, 10), row(0, 12), row(3, 13, 10, 3)]
    excluded = facts_of(rows)["excluded"]
    assert excluded.tolist() == [
        [False, True, True, False, True, False],
        [True, False, False, False, True, False],
        [True, True, False, False, True, False],
        [False, False, False, False, False, True],
    ]
    # Nothing of an excluded candidate reaches the loss.
    given = vectors(10, 6).requires_grad_()
    facts = facts_of(rows)
    cut = {**facts, "excluded": facts["excluded"].clone().fill_(True)}
    for index in range(4):
        cut["excluded"][index, index] = False
    assert Objective("info_nce")(given, cut).item() == pytest.approx(0.0, abs=1e-12)
    info_nce(given[:4], given[4:], facts["excluded"], 20.0)[None].sum().backward()
    assert given.grad is not None and bool(given.grad.isfinite().all())


def test_cosent_counts_pairs_in_the_wrong_order() -> None:
    left, right = vectors(4, 5), vectors(4, 5, seed=1)
    scores = torch.tensor([0.1, 0.9, 0.9, 0.4])
    cos = cosine_similarity(left, right)
    total = 1.0 + sum(
        math.exp(20 * float(cos[j] - cos[i])) for i in range(4) for j in range(4) if scores[i] > scores[j]
    )
    assert cosent(left, right, scores, 20.0).item() == pytest.approx(math.log(total), rel=1e-10)


def test_triplet_and_cosine() -> None:
    rows = [row(0, 10, 20), row(1, 11, 21, 22)]
    given = vectors(7, 5)
    a, p, q = given[:2], given[2:4], given[4:]
    gaps = [
        max(0.0, float(cosine_similarity(a[i], q[k], dim=0) - cosine_similarity(a[i], p[i], dim=0)) + 0.3)
        for i, k in ((0, 0), (1, 1), (1, 2))
    ]
    owners = facts_of(rows)["owners"]
    assert triplet(a, p, q, owners, 0.3).item() == pytest.approx(sum(gaps) / 3, rel=1e-10)
    scored = [row(0, 10, score=0.2), row(1, 11, score=0.7)]
    expected = ((cosine_similarity(a, p) - torch.tensor([0.2, 0.7])) ** 2).mean()
    assert Objective("cosine")(given[:4], facts_of(scored)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_matryoshka_is_the_mean_over_lengths() -> None:
    rows, given = [row(0, 10), row(1, 11)], vectors(4, 8)
    facts = facts_of(rows)
    parts = [Objective("info_nce")(given[:, :dim], facts) for dim in (8, 4)]
    assert Objective("info_nce", dims=(8, 4))(given, facts).item() == pytest.approx(
        torch.stack(parts).mean().item()
    )


def test_retrieval_by_hand() -> None:
    documents = torch.eye(12)
    # The first query's document is nearest; the second's two are third and twelfth.
    first = torch.linspace(1.0, 0.1, 12)
    found = retrieval(torch.stack([first, first]), documents, [{0}, {2, 11}])
    assert found["recall@1"] == pytest.approx((1 + 0) / 2)
    assert found["recall@10"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["mrr@10"] == pytest.approx((1 + 1 / 3) / 2)
    best = 1 / math.log2(2) + 1 / math.log2(3)
    assert found["ndcg@10"] == pytest.approx((1 + (1 / math.log2(4)) / best) / 2)


def test_spearman_shares_ranks_among_ties() -> None:
    # Ranks 1.5 1.5 3 4 against 1 2 3 4: covariance 4.5, variances 4.5 and 5.
    found = spearman(torch.tensor([1.0, 1.0, 2.0, 9.0]), torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert found == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman(torch.ones(3), torch.arange(3.0)) == 0.0
