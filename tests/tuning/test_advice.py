"""The rules give the published figures where those apply, and move as they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pronghorn.tuning.advice import Facts, advise

#: Llama-3.1-8B on 20,000 rows; adapters of rank 1 have 2.6 million elements.
FACTS = Facts("llama", 4096, 2_621_440, rows=20_000, tokens=800.0, supervised=512.0, batch=32)


def values(facts: Facts) -> dict[str, Any]:
    return {one.name: one.value for one in advise(facts)}


def test_the_published_rates_come_out() -> None:
    """LoRA Without Regret's fit at 8 billion and 1 billion parameters; its authors' sweep found 3e-4 and 1e-3."""
    assert values(FACTS)["learning_rate"] == pytest.approx(2.9e-4, rel=0.02)
    small = values(replace(FACTS, hidden=2048))["learning_rate"]
    assert small == pytest.approx(4.9e-4, rel=0.02)
    assert values(replace(FACTS, model_type="qwen3"))["learning_rate"] == pytest.approx(4.7e-4, rel=0.02)


def test_full_fine_tuning_takes_a_tenth() -> None:
    full = values(replace(FACTS, adapters=False))
    assert full["learning_rate"] == pytest.approx(values(FACTS)["learning_rate"] / 10, rel=0.02)
    assert "r" not in full and "lora_alpha" not in full


def test_the_rate_goes_with_the_root_of_the_batch_within_a_half() -> None:
    rates = [values(replace(FACTS, batch=batch))["learning_rate"] for batch in (2, 8, 24, 32, 64, 512)]
    assert rates[0] == rates[1] == pytest.approx(rates[3] / 1.5, rel=0.03)
    assert rates[2] / rates[3] == pytest.approx(0.75**0.5, rel=0.03)
    assert rates[4] / rates[3] == pytest.approx(2**0.5, rel=0.03) and rates[5] / rates[3] == pytest.approx(
        1.5, rel=0.03
    )


def test_few_steps_want_a_higher_rate() -> None:
    short = values(replace(FACTS, rows=1000, epochs=1))
    assert short["learning_rate"] == pytest.approx(1.5 * values(FACTS)["learning_rate"], rel=0.03)


def test_the_adapters_scale_is_made_up_for() -> None:
    rate = values(FACTS)["learning_rate"]
    assert values(replace(FACTS, rank=64))["learning_rate"] == rate, "α stays 32: no dependence on rank"
    assert values(replace(FACTS, alpha=16))["learning_rate"] == pytest.approx(2 * rate, rel=0.03)
    stabilised = values(replace(FACTS, rank=64, rslora=True))["learning_rate"]
    assert stabilised == pytest.approx(rate / 8, rel=0.05)


def test_the_rank_holds_the_supervised_tokens() -> None:
    assert values(FACTS)["r"] == 16
    assert values(replace(FACTS, rows=200_000))["r"] == 64, "102 million tokens, 39 ranks"
    assert values(replace(FACTS, rows=10**8))["r"] == 256
    assert values(replace(FACTS, rank=7))["r"] == 7


@pytest.mark.parametrize(
    ("rows", "batch", "epochs"), [(100, 4, 3), (1_000, 8, 2), (3_000, 32, 3), (100_000, 32, 1)]
)
def test_small_data_gets_small_batches_and_more_passes(rows: int, batch: int, epochs: int) -> None:
    found = values(replace(FACTS, rows=rows, batch=None))
    assert (found["batch"], found["num_train_epochs"]) == (batch, epochs)


def test_every_rule_says_its_source_and_its_limits() -> None:
    for one in advise(replace(FACTS, batch=None)):
        assert one.rule and one.source and one.fails, one.name
