"""The advised rate on curves whose answer is known, and where there is none."""

from __future__ import annotations

import math
import random

import pytest

from pronghorn.tuning.rate_chart import chart
from pronghorn.tuning.rates import choose, geometric, has_diverged, smoothed, sparkline

RATES = geometric(1e-5, 1.0, 101)


def curve(works: float, harms: float, noise: float = 0.0, seed: int = 0) -> list[float]:
    """Changes of a loss that falls from the rate `works` on and rises steeply from `harms` on."""
    rng = random.Random(seed)
    return [
        -1.0 / (1 + (works / rate) ** 2) + min((rate / harms) ** 3, 20.0) + rng.gauss(0, noise)
        for rate in RATES
    ]


def test_rates_grow_by_one_factor() -> None:
    assert RATES[0] == pytest.approx(1e-5) and RATES[-1] == pytest.approx(1.0) and len(RATES) == 101
    assert RATES[51] / RATES[50] == pytest.approx(RATES[1] / RATES[0])


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("works", [1e-4, 1e-3, 1e-2])
def test_the_advice_lies_between_where_it_works_and_where_it_harms(works: float, noise: float) -> None:
    for seed in range(5):
        found = choose(RATES, curve(works, 50 * works, noise, seed))
        assert found is not None
        assert works <= found.first <= found.rate <= found.last <= 50 * works
        assert 0.5 < found.fall < 1.2


def test_a_narrow_valley_is_met_and_a_wide_one_in_its_middle() -> None:
    narrow, wide = choose(RATES, curve(1e-3, 1e-2)), choose(RATES, curve(1e-4, 1e-1))
    assert narrow is not None and wide is not None
    assert narrow.rate == pytest.approx(3e-3, rel=0.4) and wide.rate == pytest.approx(3e-3, rel=0.7)
    assert wide.last / wide.first > 2 * narrow.last / narrow.first


def test_moving_the_curve_moves_the_advice_as_far() -> None:
    first, second = choose(RATES, curve(1e-4, 1e-2)), choose(RATES, curve(1e-3, 1e-1))
    assert first is not None and second is not None
    assert second.rate / first.rate == pytest.approx(10, rel=0.05)


def test_without_a_fall_there_is_no_advice() -> None:
    rng = random.Random(1)
    assert choose(RATES, [rng.gauss(0, 0.1) for _ in RATES]) is None
    assert choose(RATES, [0.02 * i for i in range(101)]) is None
    assert choose(RATES[:3], [0.0, -1.0, -2.0]) is None, "too few points to tell"


def test_values_that_are_no_numbers_are_left_out() -> None:
    values = curve(1e-3, 3e-2)
    plain = choose(RATES[:90], values[:90])
    broken = choose(RATES, values[:90] + [math.nan, math.inf] + [math.nan] * 9)
    assert plain is not None and broken is not None and broken.rate == plain.rate


def test_a_test_ends_where_its_loss_went_up_for_good() -> None:
    falling = [-0.01 * i for i in range(30)]
    assert not has_diverged(falling, loss=3.0) and not has_diverged([], loss=3.0)
    assert not has_diverged([*falling, 0.5], loss=3.0), "one bad batch is none"
    assert has_diverged([*falling, 0.6, 0.7, 0.8], loss=3.0)
    assert has_diverged([*falling, math.nan], loss=3.0)


def test_smoothing_keeps_a_line_and_quiets_noise() -> None:
    line = [math.log(rate) for rate in RATES]
    assert smoothed(RATES, line)[35:65] == pytest.approx(line[35:65], abs=1e-4)
    rng = random.Random(0)
    noisy = [rng.gauss(0, 1) for _ in RATES]
    assert sum(v * v for v in smoothed(RATES, noisy)) < 0.3 * sum(v * v for v in noisy)


def test_a_sparkline_has_gaps_and_ends() -> None:
    assert sparkline([0.0, 1.0, math.nan, 0.5]) == "▁█ ▅" or sparkline([0.0, 1.0, math.nan, 0.5]) == "▁█ ▄"
    assert (
        len(sparkline(range(1000), 40)) == 40
        and sparkline([math.nan]) == ""
        and sparkline([2.0, 2.0]) == "▁▁"
    )


def test_the_chart_marks_the_advice_and_survives_nan() -> None:
    values = curve(1e-3, 3e-2)
    found = choose(RATES, values)
    assert found is not None
    drawn = chart(RATES, [*values[:-1], math.nan], found.smooth, found.rate)
    assert drawn.startswith("<svg") and "nan" not in drawn and f"advised: {found.rate:.2g}" in drawn
    assert drawn.count("<circle") == len(RATES) - 1 and "1e-3" in drawn
