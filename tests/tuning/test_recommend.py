"""`SFTConfig.recommended` reads model and rows, and leaves alone what was given."""

from __future__ import annotations

from pathlib import Path

import pytest

from pronghorn.errors import DatasetUnusable
from pronghorn.training import SFTConfig
from pronghorn.tuning.recommend import facts_of
from tests.tiny import tiny_tokenizer
from tests.training.runs import adapter_model, chats, trainer

ROWS = [
    {"messages": [{"role": "user", "content": "a" * 40}, {"role": "assistant", "content": "b" * 80}]}
] * 600


def test_facts_are_read_from_the_model_and_a_sample() -> None:
    model = adapter_model()
    facts = facts_of(model, ROWS, None, {})
    assert (facts.model_type, facts.hidden, facts.adapters, facts.rank, facts.alpha) == (
        "llama",
        64,
        True,
        4,
        8,
    )
    assert (facts.rows, facts.tokens, facts.supervised) == (600, 30, 20)
    # q and v (64 + 64, 64 + 32) and down (128 + 64) in two layers.
    assert facts.rank_parameters == 2 * (128 + 96 + 192)
    exact = facts_of(model, ROWS[:3], tiny_tokenizer(), {})
    assert exact.tokens > 120 and 40 < exact.supervised < exact.tokens, "letters are tokens of their own"
    tokens = facts_of(model, [{"input_ids": [1] * 10, "labels": [-100] * 6 + [1] * 4}], None, {})
    assert (tokens.rows, tokens.tokens, tokens.supervised) == (1, 10, 4)


def test_the_configuration_trains(tmp_path: Path) -> None:
    model, rows = adapter_model(), chats(40)
    config = SFTConfig.recommended(model, rows, tiny_tokenizer(), output_dir=str(tmp_path), max_steps=1)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 4
    assert config.lr_scheduler_type == "linear" and config.warmup_steps == 2 and config.max_steps == 1
    assert 1e-3 < config.learning_rate < 1e-1, "a width of 64 wants a high rate"
    assert {"learning_rate", "max_steps"} <= config.given
    run = trainer(tmp_path, model, rows)
    run.args = config
    assert run.get_train_dataloader() is not None


def test_what_is_given_stays_and_the_rest_follows() -> None:
    model = adapter_model()
    large = SFTConfig.recommended(model, ROWS, per_device_train_batch_size=64, gradient_accumulation_steps=4)
    small = SFTConfig.recommended(model, ROWS, per_device_train_batch_size=4)
    assert (large.per_device_train_batch_size, large.gradient_accumulation_steps) == (64, 4)
    assert large.num_train_epochs == 3 > small.num_train_epochs
    assert SFTConfig.recommended(model, ROWS, learning_rate=7e-5).learning_rate == 7e-5


def test_rows_without_text_are_refused() -> None:
    with pytest.raises(DatasetUnusable, match="no row has text"):
        SFTConfig.recommended(adapter_model(), [{"number": 3}])
