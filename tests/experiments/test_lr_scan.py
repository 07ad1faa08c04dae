"""A scan trains every candidate from the same start, judges them alike, and leaves the trainer as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from pronghorn.errors import NoRateFound
from pronghorn.experiments.lr_scan import scan
from tests.training.runs import chats, trained, trainer


def test_the_best_candidate_is_the_one_that_trains_best(tmp_path: Path) -> None:
    run = trainer(tmp_path, optim="adamw_torch", eval_dataset=chats(6))
    weights, evaluated = trained(run.model), run.evaluate()["eval_loss"]
    told: list[str] = []

    class Listening(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            told.append("an evaluation")

        def on_log(self, args, state, control, **kwargs):
            told.append("a log")

    run.add_callback(Listening())
    history = list(run.state.log_history)
    found = scan(run, [1e-2, 1e-5, 1e-3], steps=6)
    assert not told and run.state.log_history == history, "a scan is none of the run's business"
    assert [one.rate for one in found.candidates] == [
        1e-5,
        1e-3,
        1e-2,
    ] and found.judged_by == "held-back rows"
    losses = [one.loss for one in found.candidates]
    assert losses == sorted(losses, reverse=True) and found.best.rate == 1e-2 and found.at_edge
    assert found.best.change == pytest.approx(found.best.loss - evaluated, abs=1e-6)
    for name, value in trained(run.model).items():
        assert torch.equal(value, weights[name]), name


def test_a_candidate_does_not_depend_on_the_others(tmp_path: Path) -> None:
    run = trainer(tmp_path, optim="adamw_torch")
    alone, among = scan(run, [3e-3], steps=5), scan(run, [1e-2, 3e-3], steps=5)
    assert alone.candidates[0] == among.candidates[0] and among.judged_by == "the batches of the last steps"
    run.args.learning_rate, run.args.max_steps = 3e-3, 5
    run.args.lr_scheduler_type = "linear"
    run.train()
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(logged[-2:]) / 2 == pytest.approx(alone.candidates[0].loss, rel=1e-3)


def test_rates_that_do_nothing_are_told(tmp_path: Path) -> None:
    run = trainer(tmp_path, optim="sgd")
    with pytest.raises(NoRateFound, match="none of the rates 1e-30"):
        scan(run, [1e-30], steps=3)
