"""The grid, the rows and the verdict of benchmarks.lr_finder; its trainings take half an hour and more."""

from __future__ import annotations

import pytest

from benchmarks.lr_finder import DATA_SETS, HELD_BACK, grid, rows_of, table


def test_the_grid_has_so_many_rates_a_decade() -> None:
    assert grid(3.2e-4, 1e-2, 4) == [3.2e-4, 5.7e-4, 1e-3, 1.8e-3, 3.2e-3, 5.7e-3, 1e-2]


@pytest.mark.parametrize("name", DATA_SETS)
def test_rows_are_many_and_held_back_ones_are_others(name: str) -> None:
    train, held = rows_of(name)
    assert len(train) > 640 and len(held) == HELD_BACK
    assert not [row for row in held if row in train]
    assert rows_of.__wrapped__(name)[1] == held, "the same rows every time"


def test_a_rate_that_ends_too_high_is_red() -> None:
    def found(loss: float) -> dict:
        grid = {"0.001": {"held": 2.0}, "0.003": {"held": 2.1}}
        return {"advised": {"learning_rate": 2e-3}, "grid": grid, "at_advised": {"held": loss}}

    text = table({"near": found(2.03), "far": found(2.05), "lower": found(1.99)})
    near, far, lower = text.splitlines()[2:]
    assert "+1.5%" in near and "red" not in near and "| 0.001 |" in near
    assert "+2.5% (red)" in far and "-0.5%" in lower and "red" not in lower
