"""The grid, the rows and the verdict of benchmarks.lr_finder; its trainings take half an hour and more."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.lr_finder import (
    ALLOWED,
    DATA_SETS,
    HELD_BACK,
    LEAST_RATES,
    between,
    grid,
    reading,
    rows_of,
    table,
)  # fmt: skip
from pronghorn.tuning.rates import changes_of, choose

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MEASURED = {
    f"{path.stem}: {name}": cell
    for path in sorted(RESULTS.glob("*-lr-finder.json"))
    for name, cell in json.loads(path.read_text()).items()
}


def test_the_grid_has_so_many_rates_a_decade() -> None:
    assert grid(3.2e-4, 1e-2, 4) == [3.2e-4, 5.7e-4, 1e-3, 1.8e-3, 3.2e-3, 5.7e-3, 1e-2]


@pytest.mark.parametrize("name", DATA_SETS)
def test_rows_are_many_and_held_back_ones_are_others(name: str) -> None:
    train, held = rows_of(name)
    assert len(train) > 640 and len(held) == HELD_BACK
    assert not [row for row in held if row in train]
    assert rows_of.__wrapped__(name)[1] == held, "the same rows every time"


@pytest.mark.parametrize("data", sorted({name.partition(", seed")[0] for name in MEASURED}))
def test_the_curves_that_were_measured_are_read_to_a_rate_that_was_good(data: str) -> None:
    """On the average over seeds: neighbouring rates of one seed differ by as much as is allowed."""
    above = [
        reading(cell)[1] / min(run["held"] for run in cell["grid"].values()) - 1
        for name, cell in MEASURED.items()
        if name.partition(", seed")[0] == data and len(cell["grid"]) >= LEAST_RATES
    ]
    assert not above or (sum(above) / len(above) <= ALLOWED and max(above) <= 1.5 * ALLOWED), above


def test_a_loss_between_two_rates_is_on_their_line() -> None:
    runs = {"0.01": {"held": 3.0}, "0.001": {"held": 2.0}}
    assert between(10**-2.5, runs) == pytest.approx(2.5) and between(1e-3, runs) == pytest.approx(2.0)
    assert math.isnan(between(0.1, runs))


def rate_of(test: dict) -> float:
    choice = choose(
        test["rates"], changes_of([loss or math.nan for loss in test["losses"]], test["losses_before"])
    )
    assert choice is not None
    return choice.rate


@pytest.mark.parametrize("data", DATA_SETS)
def test_seeds_agree_on_a_rate(data: str) -> None:
    rates = [rate_of(cell["advised"]) for name, cell in MEASURED.items() if f": {data}, seed" in name]
    assert len(rates) == 6 and max(rates) <= 2.2 * min(rates), rates


def test_a_rate_that_ends_too_high_is_red() -> None:
    def found(loss: float) -> dict:
        grid = {"0.001": {"held": 2.0}, "0.003": {"held": 2.1}, "0.01": {"held": 9.0}}
        return {"advised": {"learning_rate": 2e-3}, "grid": grid, "at_advised": {"held": loss}}

    few = {**found(2.0), "grid": {"0.001": {"held": 2.0}}}
    text = table({"few": few, "near": found(2.03), "far": found(2.05), "lower": found(1.99)})
    near, far, lower = text.splitlines()[2:]
    assert "+1.5%" in near and "red" not in near and "| 0.001 |" in near
    assert "+2.5% (red)" in far and "-0.5%" in lower and "red" not in lower
