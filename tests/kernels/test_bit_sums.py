"""Sums over words of memory, which are others once it has been written to."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.bit_sums import ROWS, RUN, Pieces, bit_sums, words_of
from tests.kernels.compare import IMPLS, random

#: numbers, words from one run to the next: whole with a rest, several pieces, in part
CASES = [(8, RUN), (42, RUN), (2 * RUN * ROWS + 2 * RUN + 2, RUN), (2 * 32 * (ROWS + 3), 32)]


def tensors_of(dtype, device):
    return [random(numbers, dtype=dtype, device=device, seed=i) for i, (numbers, _) in enumerate(CASES)]


def pieces_of(tensors):
    return Pieces([words_of(tensor) for tensor in tensors], [stride for _, stride in CASES])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_give_the_same(dtype, device):
    tensors = tensors_of(dtype, device)
    pieces = pieces_of(tensors)
    assert {number for number, *_ in pieces.plan} == {0, 1, 2, 3} and len(pieces.plan) > len(tensors)
    found = [bit_sums(pieces, impl=impl).tolist() for impl in IMPLS]
    assert found[0] == found[1]
    elsewhere = pieces_of([tensor.clone() for tensor in tensors])
    assert bit_sums(elsewhere, impl="torch").tolist() == found[0]


@pytest.mark.parametrize("impl", IMPLS)
def test_writes_are_seen(impl, device):
    tensors = tensors_of(torch.bfloat16, device)
    pieces = pieces_of(tensors)
    seen = [bit_sums(pieces, impl=impl).tolist()]

    def expect_other(piece_of):
        seen.append(bit_sums(pieces, impl=impl).tolist())
        changed = [
            number for (number, *_), a, b in zip(pieces.plan, seen[-2], seen[-1], strict=True) if a != b
        ]
        assert set(changed) == {piece_of}

    tensors[0].neg_()
    expect_other(0)
    tensors[1][-1] += 1  # the last word, which is the second one of its run
    expect_other(1)
    tensors[2][[3, 40]] = tensors[2][[40, 3]]
    expect_other(2)
    tensors[2][-1] = float("nan")
    expect_other(2)
    tensors[3][64] += 1  # where the second run begins
    expect_other(3)
    tensors[3][2 * RUN] += 1  # between two runs
    assert bit_sums(pieces, impl=impl).tolist() == seen[-1]


def test_memory_that_is_no_whole_words():
    assert words_of(torch.zeros(3, dtype=torch.bfloat16)) is None
    assert words_of(torch.zeros(5, dtype=torch.bfloat16)[1:]) is None
    assert words_of(torch.zeros(4, 4).t()) is None
    assert words_of(torch.zeros(6, dtype=torch.bfloat16)[2:]).shape == (2,)
