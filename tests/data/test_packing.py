"""Packing keeps every document whole and once, and is close to the best there is."""

from __future__ import annotations

import random
from functools import cache

import pytest

from pronghorn.data.packing import best_fit_decreasing


def fewest_rows(lengths: tuple[int, ...], capacity: int) -> int:
    """The optimum, by trying every assignment (symmetric ones once)."""

    @cache
    def place(index: int, free: tuple[int, ...]) -> int:
        if index == len(lengths):
            return len(free)
        best = place(index + 1, tuple(sorted((*free, capacity - lengths[index]))))
        for space in set(free):
            if space >= lengths[index]:
                rest = list(free)
                rest.remove(space)
                best = min(best, place(index + 1, tuple(sorted((*rest, space - lengths[index])))))
        return best

    return place(0, ())


def slow_best_fit(lengths: list[int], capacity: int) -> int:
    """Best-fit-decreasing by its definition; the number of rows."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, space in enumerate(free) if space >= length]
        if fitting:
            best = min(fitting, key=lambda i: free[i])
            free[best] -= length
        else:
            free.append(capacity - length)
    return len(free)


@pytest.mark.parametrize("seed", range(20))
def test_every_document_once_and_no_row_too_full(seed):
    rng = random.Random(seed)
    capacity = rng.choice([1, 7, 64, 1000])
    lengths = [rng.randint(1, capacity) for _ in range(rng.randint(0, 400))]
    rows = best_fit_decreasing(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= capacity for row in rows)
    assert len(rows) == slow_best_fit(lengths, capacity)
    assert rows == best_fit_decreasing(lengths, capacity)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert all(row == sorted(row) for row in rows)


@pytest.mark.parametrize("seed", range(30))
def test_within_the_bound_of_the_optimum(seed):
    rng = random.Random(seed)
    capacity = rng.randint(4, 20)
    lengths = [rng.randint(1, capacity) for _ in range(rng.randint(1, 9))]
    best = fewest_rows(tuple(lengths), capacity)
    rows = best_fit_decreasing(lengths, capacity)
    assert best <= len(rows) <= 11 / 9 * best + 1


def test_documents_like_real_ones_fill_rows():
    rng = random.Random(0)
    lengths = [min(2048, int(rng.lognormvariate(5.5, 0.9)) + 1) for _ in range(20_000)]
    rows = best_fit_decreasing(lengths, 2048)
    assert sum(lengths) / (len(rows) * 2048) > 0.99


@pytest.mark.parametrize("lengths, capacity", [([5], 4), ([0], 4), ([-1], 4), ([1], 0)])
def test_refuses_what_cannot_fit(lengths, capacity):
    with pytest.raises(ValueError):
        best_fit_decreasing(lengths, capacity)
