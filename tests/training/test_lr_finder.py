"""A learning-rate test leaves no trace, stops where it diverges, and advises a rate that trains."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy
import pytest
import torch

from pronghorn.errors import DatasetUnusable, NoRateFound, TrainerBusy, UnknownArgument
from pronghorn.training.borrowed import borrow
from pronghorn.training.lr_finder import range_test
from tests.training.runs import adapter_model, chats, losses, trained, trainer


def _run(
    folder: Path, *, test: bool, **options: object
) -> tuple[list[float], dict[str, torch.Tensor], list[object]]:
    """Losses and parameters of a run with dropout, with or without a test before it; and the next random numbers."""
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    run = trainer(
        folder, adapter_model(dropout=0.2), optim="adamw_torch", learning_rate=1e-2, max_steps=3,
        lr_scheduler_type="linear", warmup_steps=1, gradient_accumulation_steps=2, max_grad_norm=1.0, **options,
    )  # fmt: skip
    if test:
        range_test(run, steps=12, lowest=1e-4)
    run.train()
    drawn = [torch.rand(1).item(), random.random(), numpy.random.rand()]
    return losses(run), trained(run.model), drawn


def test_a_run_after_a_test_is_the_run_without_one(tmp_path: Path) -> None:
    plain, weights, drawn = _run(tmp_path / "a", test=False, per_device_train_batch_size=3)
    after, weights_after, drawn_after = _run(tmp_path / "b", test=True, per_device_train_batch_size=3)
    assert after == plain
    for name, value in weights.items():
        assert torch.equal(value, weights_after[name]), name
    assert drawn_after == drawn


def test_between_two_runs_optimizer_and_scheduler_stay(tmp_path: Path) -> None:
    run = trainer(tmp_path, optim="adamw_torch", learning_rate=1e-2, max_steps=3)
    run.train()
    optimizer, state, args, callbacks = (
        run.optimizer,
        run.state,
        run.args,
        list(run.callback_handler.callbacks),
    )
    moments = [value.clone() for item in optimizer.state_dict()["state"].values() for value in item.values()]
    weights = trained(run.model)
    history = list(run.state.log_history)
    range_test(run, steps=12, lowest=1e-4)
    assert (run.optimizer, run.state, run.args) == (optimizer, state, args)
    assert run.callback_handler.callbacks == callbacks and run.state.log_history == history
    for before, item in zip(
        moments, (v for i in optimizer.state_dict()["state"].values() for v in i.values()), strict=True
    ):
        assert torch.equal(before, item)
    for name, value in trained(run.model).items():
        assert torch.equal(value, weights[name]), name
    assert not list(tmp_path.glob("**/checkpoint-*"))


def test_a_lent_trainer_trains_at_the_given_rates_until_it_is_stopped(tmp_path: Path) -> None:
    run = trainer(tmp_path, optim="sgd", max_steps=1)
    asked: list[int] = []
    weights = trained(run.model)

    def rate(step: int) -> float:
        asked.append(step)
        return 0.0 if step < 2 else 0.5

    with borrow(run) as lent:
        before = lent.losses(6)
        lent.rewind()
        found = lent.train(6, rate, lambda losses: len(losses) == 4)
        moved = trained(run.model)
    assert asked == [0, 1, 2, 3] and len(found) == 4
    assert found[:2] == pytest.approx(before[:2], rel=1e-5), "the same batches; at rate 0 nothing moves"
    assert found[3] < before[3]
    assert any(not torch.equal(moved[name], value) for name, value in weights.items())
    assert all(torch.equal(trained(run.model)[name], value) for name, value in weights.items())


def test_what_is_found_can_be_written(tmp_path: Path) -> None:
    found = range_test(trainer(tmp_path, optim="adamw_torch"), lowest=1e-4, steps=16)
    assert found.choice.first <= found.rate <= found.choice.last and min(found.changes) < -0.1
    paths = found.write(tmp_path / "plots")
    assert json.loads(paths[0].read_text())["learning_rate"] == found.rate
    assert paths[1].read_text().startswith("<svg") and f"advised: {found.rate:.2g}" in paths[1].read_text()


def test_the_method_returns_the_rate_and_leaves_plot_and_figures(tmp_path: Path) -> None:
    run = trainer(tmp_path / "out", optim="adamw_torch")
    rate = run.get_best_learning_rate(lowest=1e-4, steps=16)
    assert 1e-4 < rate < 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"lr_finder.json", "lr_finder.svg"}


def test_where_nothing_can_be_learned_there_is_no_rate(tmp_path: Path) -> None:
    run = trainer(tmp_path, optim="adamw_torch")
    with pytest.raises(NoRateFound, match="at no rate from 1e-12 to 1e-11"):
        range_test(run, lowest=1e-12, highest=1e-11, steps=12)


def test_a_trainer_that_trains_is_not_lent(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.is_in_train = True
    with pytest.raises(TrainerBusy):
        range_test(run, steps=12)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lowest": -1.0}, "cannot rise from -1 to 1"),
        ({"lowest": 0.1, "highest": 0.1}, "cannot rise from 0.1 to 0.1"),
        ({"highest": math.nan}, "cannot rise from 1e-05 to nan"),
        ({"steps": 5}, "5 steps make no curve"),
    ],
)
def test_what_makes_no_curve_is_refused_before_anything_is_trained(
    options: dict[str, float], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UnknownArgument, match=said):
        range_test(trainer(tmp_path), **options)


def test_a_stream_of_rows_is_not_lent(tmp_path: Path) -> None:
    run = trainer(tmp_path, rows=chats(12).to_iterable_dataset())
    with pytest.raises(DatasetUnusable, match="a stream"):
        range_test(run, steps=12)
