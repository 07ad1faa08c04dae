"""The likeliest tokens and the vectors of the next step."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.next_token import Rows, embed_next, take_likeliest_
from tests.kernels.compare import IMPLS, random


def taken(logits, lengths, impl, turn=0):
    """Tokens and lengths after a step that takes `turn`, as the host is told them, too."""
    rows, device = len(logits), logits.device
    tokens = torch.full((rows + 1,), 7, dtype=torch.int64, device=device)
    state = torch.tensor([[*lengths], [5] * rows, [turn] * rows], dtype=torch.int32, device=device)
    told = torch.full((3, rows + 2), 9, dtype=torch.int64)
    if device.type == "cuda":
        told = told.pin_memory() if impl == "triton" else told.to(device)
    lost = torch.tensor([41], device=device)
    take_likeliest_(logits, Rows(tokens[:rows], *state, told, lost), impl=impl)
    assert tokens[-1] == 7
    assert state[1].tolist() == [-1] * rows
    assert state[2].tolist() == [(turn + 1) % 3] * rows
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert told[turn].tolist() == [41, *tokens[:rows].tolist(), 9]
    assert (told[torch.arange(3) != turn] == 9).all()
    return tokens[:rows].tolist(), state[0].tolist()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, width", [(1, 5003), (1, 700), (3, 1024), (5, 4099)])
def test_the_first_of_the_largest(impl, dtype, rows, width, device):
    lengths = [3 * row for row in range(rows)]  # the first row holds no sequence
    for seed in range(2):  # the second launch finds what the first has left
        logits = random(rows, width, dtype=dtype, device=device, seed=seed) - 20.0 * (seed == 1)
        logits[:, width // 2] = logits.max()
        wanted = [int((row == row.max()).nonzero()[0]) for row in logits]
        tokens, after = taken(logits, lengths, impl, 2 * seed)
        assert tokens == wanted
        assert after == [length + (length > 0) for length in lengths]


@pytest.mark.parametrize("impl", IMPLS)
def test_numbers_without_order(impl, device):
    logits = torch.zeros(4, 2100, device=device)
    logits[0, 1500] = float("nan")
    logits[1] = float("-inf")
    logits[2, 2099] = float("inf")
    logits[3] = -1.0
    logits[3, 1030] = -0.5
    tokens, _ = taken(logits, [1, 1, 1, 1], impl)
    assert tokens == [1500, 0, 2099, 1030]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [64, 1500])
def test_vectors(impl, width, device):
    weight = random(50, width, dtype=torch.bfloat16, device=device, seed=1)
    tokens = torch.tensor([3, 4, 49], device=device)
    given = torch.tensor([-1, 0, -1], dtype=torch.int32, device=device)
    assert torch.equal(embed_next(weight, tokens, given, impl=impl), weight[[3, 0, 49]])
