"""Routing: experts, weights, sorted rows and the gradient of the logits, against autograd in fp64."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.routing import Scoring
from tests.kernels.compare import IMPLS, assert_near, random

SCORINGS = {
    "some": Scoring(6, 2),
    "as it is": Scoring(37, 5, normalised=False),
    "many": Scoring(37, 5),
    "all": Scoring(5, 5, normalised=False),
    "one": Scoring(1, 1),
    "v2": Scoring(40, 5, normalised=False, scale=16.0, groups=8, top_groups=3),
    "v3": Scoring(36, 4, sigmoid=True, scale=2.5, groups=6, top_groups=2, group_scores=2),
    "sigmoid": Scoring(24, 4, normalised=False, sigmoid=True, scale=0.5),
    "normalised in groups": Scoring(24, 4, scale=3.0, groups=3, top_groups=2, group_scores=2),
}


def scores_of(logits: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    return logits.sigmoid() if scoring.sigmoid else logits.softmax(-1)


def truth(logits: torch.Tensor, scoring: Scoring, indices: torch.Tensor) -> torch.Tensor:
    taken = scores_of(logits, scoring).gather(1, indices)
    return scoring.scale * (taken / taken.sum(1, keepdim=True) if scoring.normalised else taken)


def chosen(wishes: torch.Tensor, scoring: Scoring) -> list[list[int]]:
    """The experts of each token, one token and one group at a time."""
    found, size = [], scoring.experts // scoring.groups
    for row in wishes.tolist():
        parts = [sorted(row[g * size : (g + 1) * size])[::-1] for g in range(scoring.groups)]
        sums = [sum(part[: scoring.group_scores]) for part in parts]
        best = sorted(range(scoring.groups), key=lambda g: -sums[g])[: scoring.top_groups]
        candidates = [e for e in range(scoring.experts) if e // size in best]
        found.append(sorted(candidates, key=lambda e: -row[e])[: scoring.top_k])
    return found


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", [1, 67, 700])
@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
def test_routing(impl: str, tokens: int, scoring: Scoring, device: torch.device) -> None:
    # 700 tokens of 37 experts are several blocks, the last one with tokens missing.
    logits = random(tokens, scoring.experts, dtype=torch.float32, device=device)
    routing = scoring.route(logits, impl=impl)  # type: ignore[arg-type]
    exact = logits.double().requires_grad_()
    assert routing.indices.tolist() == chosen(scores_of(exact, scoring), scoring)
    weights = truth(exact, scoring, routing.indices)
    assert_near(routing.weights, weights.detach(), slack=2)
    assert_rows_are_sorted(routing)
    assert_near(routing.row_weights, weights.detach().view(-1)[routing.places.view(-1).argsort()], slack=2)
    dweights = random(routing.tokens.numel(), dtype=torch.float32, device=device, seed=1)
    (expected,) = torch.autograd.grad(weights, exact, dweights.double()[routing.places])
    actual = scoring.backward(dweights, logits, routing, impl=impl)  # type: ignore[arg-type]
    # Differences of terms that are each as large as the gradient of the weights.
    assert (actual.double() - expected).abs().max() <= 1e-5 * dweights.abs().max()


def assert_rows_are_sorted(routing) -> None:  # type: ignore[no-untyped-def]
    """As a stable sort of the pairs by expert gives them."""
    experts, order = torch.sort(routing.indices.reshape(-1), stable=True)
    top_k = routing.indices.shape[1]
    assert torch.equal(routing.groups.experts, experts)
    assert torch.equal(routing.tokens, order // top_k)
    assert torch.equal(routing.places.view(-1)[order], torch.arange(order.numel(), device=order.device))
    counts = torch.bincount(experts, minlength=routing.groups.count)
    assert torch.equal(routing.groups.ends.long(), counts.cumsum(0))


@pytest.mark.parametrize("impl", IMPLS)
def test_all_tokens_to_the_same_experts(impl: str, device: torch.device) -> None:
    logits = torch.zeros(300, 9, device=device)
    logits[:, 4], logits[:, 7] = 2.0, 1.0
    routing = Scoring(9, 2).route(logits, impl=impl)  # type: ignore[arg-type]
    assert routing.groups.ends.tolist() == [0, 0, 0, 0, 300, 300, 300, 600, 600]
    assert_rows_are_sorted(routing)


@pytest.mark.parametrize("impl", IMPLS)
def test_logits_that_are_no_numbers_give_rows_that_exist(impl: str, device: torch.device) -> None:
    """What is wrong is then found by its values, not by an access beyond the tensors."""
    logits = random(40, 6, dtype=torch.float32, device=device)
    logits[3], logits[5, 2] = float("nan"), float("inf")
    routing = Scoring(6, 2).route(logits, impl=impl)  # type: ignore[arg-type]
    assert routing.weights[3].isnan().all()
    assert_rows_are_sorted(routing)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("groups", [1, 6])
def test_a_bias_decides_who_is_taken_and_no_weight(impl: str, groups: int, device: torch.device) -> None:
    scoring = Scoring(36, 4, sigmoid=True, groups=groups, top_groups=min(2, groups), group_scores=2)
    logits, bias = (random(n, 36, dtype=torch.float32, device=device, seed=n) for n in (50, 1))
    routing = scoring.route(logits, bias[0] * 3, impl=impl)  # type: ignore[arg-type]
    exact = logits.double()
    assert routing.indices.tolist() == chosen(exact.sigmoid() + bias[0].double() * 3, scoring)
    assert routing.indices.tolist() != chosen(exact.sigmoid(), scoring)
    assert_near(routing.weights, truth(exact, scoring, routing.indices), slack=2)
    assert_rows_are_sorted(routing)
