"""Choosing tokens: Transformers' processors leave the same tokens, and draws follow the probabilities."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pronghorn.kernels.sampling import Choice, choose, penalised, threshold, uniform
from tests.kernels.compare import random

VOCABULARY = 97


def choice(device, rows=1, *, seen=None, **options) -> Choice:
    """A choice with the same settings for every row."""

    def column(name, default, dtype=torch.float32):
        return torch.full((rows,), options.get(name, default), dtype=dtype, device=device)

    cuts = bool(options.get("top_k")) or options.get("top_p", 1.0) < 1 or bool(options.get("min_p"))
    return Choice(
        temperature=column("temperature", 1.0),
        top_k=column("top_k", 0, torch.int32),
        top_p=column("top_p", 1.0),
        min_p=column("min_p", 0.0),
        penalty=column("penalty", 1.0),
        uniform=torch.as_tensor(options.get("uniform", [0.5] * rows), device=device),
        seen=seen,
        most=options.get("most", 0),
        draws=options.get("temperature", 1.0) > 0,
        cuts=cuts,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5}, {"top_k": 5, "most": 5}, {"top_p": 0.6}, {"top_p": 0.01}, {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.7, "min_p": 0.05, "temperature": 1.7}, {"top_k": 20, "top_p": 0.7, "most": 20},
        {"top_k": 500}, {"temperature": 0.3, "top_p": 0.95},
    ],
)  # fmt: skip
def test_the_cuts_are_those_of_transformers(options, device):
    scores = random(6, VOCABULARY, dtype=torch.float32, device=device, scale=3.0)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(options.get("temperature", 1.0))])
    if "top_k" in options:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        warpers.append(MinPLogitsWarper(options["min_p"]))
    expected = warpers(None, scores.clone()) > float("-inf")
    scaled = scores / options.get("temperature", 1.0)
    least = threshold(scaled, choice(device, 6, **options))
    assert torch.equal(scaled >= least[:, None], expected)


def test_the_penalty_is_that_of_transformers(device):
    scores = random(3, VOCABULARY, dtype=torch.float32, device=device)
    ids = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0)).to(device)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, scores.clone())
    seen = torch.zeros(3, VOCABULARY, dtype=torch.bool, device=device).scatter_(1, ids, True)
    found = penalised(scores, seen, torch.full((3,), 1.3, device=device))
    torch.testing.assert_close(found, expected)


def test_draws_follow_the_probabilities(device):
    """A grid of uniform numbers meets every token as often as its probability says, up to one in the grid."""
    scores = random(1, 12, dtype=torch.float32, device=device)
    grid = (torch.arange(4000) + 0.5) / 4000
    drawn = choose(scores.expand(4000, -1), choice(device, 4000, uniform=grid.tolist(), top_k=6))
    found = torch.bincount(drawn.cpu(), minlength=12) / 4000
    kept = scores >= scores.topk(6).values[:, -1:]
    expected = scores.masked_fill(~kept, float("-inf")).softmax(-1)[0].cpu()
    assert (found - expected).abs().max() <= 1.5 / 4000


@pytest.mark.parametrize("number", [0.0, 1.0 - 2.0**-24])
def test_the_ends_of_the_range_meet_tokens_that_may_be_drawn(number, device):
    scores = torch.full((1, VOCABULARY), -40.0, device=device)
    scores[0, 3], scores[0, 90] = 2.0, 1.0
    drawn = choose(scores, choice(device, uniform=[number], top_k=2))
    assert drawn.item() == (3 if number == 0.0 else 90)


def test_temperature_zero_takes_the_largest_beside_rows_that_draw(device):
    scores = random(2, VOCABULARY, dtype=torch.float32, device=device)
    mixed = choice(device, 2, uniform=[0.999, 0.999])
    mixed.temperature[0] = 0.0
    assert choose(scores, mixed)[0] == scores[0].argmax()


def test_uniform_numbers_are_philoxs():
    """Triton draws the same ones; Random123's known answers are of other counters, so its numbers stand in."""
    tl = pytest.importorskip("triton.language")
    triton = pytest.importorskip("triton")

    @triton.jit
    def kernel(out, seed, offset, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(out + at, tl.rand(seed, offset + at))

    target = "cuda" if torch.cuda.is_available() else "cpu"
    for seed in (0, 1, 12345678901234567):
        out = torch.empty(16, device=target)
        kernel[(1,)](out, seed, 3, BLOCK=16)
        ours = torch.tensor([uniform(seed, 3 + i) for i in range(16)])
        torch.testing.assert_close(out.cpu(), ours, atol=1e-6, rtol=0)
    numbers = torch.tensor([uniform(7, i) for i in range(2000)])
    assert abs(numbers.mean() - 0.5) < 0.03 and numbers.min() >= 0 and numbers.max() < 1
