"""Logs that are written while the next step runs: the same logs, at another moment."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from pronghorn.training import SFTTrainer, late_logs
from pronghorn.training.meter import Sent
from tests.tiny import tiny_tokenizer
from tests.training.runs import adapter_model, chats, settings, trainer

TIMED = (
    "tokens_per_second",
    "peak_memory_gib",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
)
#: what a longer run is like: logs that fall on evaluations, saves, the end of an epoch, and on none of these
SCHEDULE = {
    "max_steps": 9,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 6,
}


@pytest.fixture
def waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are waited for as they are on a GPU."""
    monkeypatch.setattr(late_logs, "_is_waited_for", lambda loss: True)


class Order(TrainerCallback):
    """Steps that ended and logs that were written, in their order."""

    takes_late_logs = True

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(f"step {state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.seen.append(f"log {state.global_step}")


def logs_of(folder: Path, **options: Any) -> tuple[list[dict[str, Any]], Any]:
    run = trainer(folder, eval_dataset=chats(3), **options)
    output = run.train()
    logs = [
        {k: v for k, v in entry.items() if k not in TIMED and "eval_" not in k[:5]}
        for entry in run.state.log_history
    ]
    return [*logs, {"train_loss": output.training_loss}], run


@pytest.mark.parametrize(
    "options",
    [{}, {"logging_steps": 2}, {"gradient_accumulation_steps": 2}, {"num_train_epochs": 2, "max_steps": -1}],
)
def test_the_same_logs(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = SCHEDULE | options
    at_once, before = logs_of(tmp_path / "at once", **options)
    monkeypatch.setattr(late_logs, "_is_waited_for", lambda loss: True)
    late, run = logs_of(tmp_path / "late", **options)
    assert late == at_once
    assert list(run._ledger.steps) == list(before._ledger.steps)
    assert list(run._ledger.losses) == list(before._ledger.losses)
    assert list(run._ledger.norms) == list(before._ledger.norms)


def test_written_after_the_next_step_was_launched(tmp_path: Path, waited_for: None) -> None:
    order = Order()
    run = trainer(tmp_path, callbacks=[order], max_steps=3)
    step = run._static_steps

    def launched() -> Any:
        if order.seen[-1:] != ["launch"]:  # asked for more than once a step
            order.seen.append("launch")
        return step()

    run._static_steps = launched  # type: ignore[method-assign]
    run.train()
    assert order.seen == [
        "launch", "step 1", "launch", "log 1", "step 2", "launch", "log 2", "step 3", "log 3",
    ]  # fmt: skip


class Stops(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        control.should_training_stop = True


@pytest.mark.parametrize("how", ["callback", "stop_early", "evaluation"])
def test_who_may_act_on_a_log_gets_it_at_once(how: str, tmp_path: Path, waited_for: None) -> None:
    order = Order()
    options: dict[str, Any] = {
        "callback": {"callbacks": [order, Stops()]},
        "stop_early": {"callbacks": [order], "stop_early": True, "eval_dataset": chats(3)},
        "evaluation": {
            "callbacks": [order],
            "eval_dataset": chats(3),
            "eval_strategy": "steps",
            "eval_steps": 1,
        },
    }[how]
    run = trainer(tmp_path, max_steps=3, **options)
    run.train()
    steps = 1 if how == "callback" else 3
    assert order.seen == [entry for n in range(1, steps + 1) for entry in (f"step {n}", f"log {n}")]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_loses_no_log(error: type, tmp_path: Path, waited_for: None) -> None:
    class Fails(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                raise error("in the third step")

    run = trainer(tmp_path, callbacks=[Fails()], max_steps=5)
    with pytest.raises(error, match="in the third step"):
        run.train()
    assert [entry["step"] for entry in run.state.log_history] == [1, 2]


def test_a_log_that_cannot_be_written_hides_no_error(
    tmp_path: Path, waited_for: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                raise RuntimeError("the first error")

    def broken(self: Sent) -> list[float]:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Sent, "read", broken)
    run = trainer(tmp_path, callbacks=[Fails()], max_steps=5)
    with pytest.raises(RuntimeError, match="the first error"):
        run.train()
    assert "the last log could not be written: the device is gone" in caplog.text


def test_logs_of_others_come_behind(tmp_path: Path, waited_for: None) -> None:
    class Adds(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step:
                run.log({"own": float(state.global_step)})

    run = trainer(tmp_path, callbacks=[Adds()], max_steps=3)
    run.train()
    found = [
        next(name for name in ("loss", "own", "train_loss") if name in entry)
        for entry in run.state.log_history
    ]
    assert found == ["loss", "own", "loss", "own", "loss", "train_loss"]


def test_a_run_that_begins_again_has_no_logs_of_the_first(tmp_path: Path, waited_for: None) -> None:
    """As with `auto_find_batch_size`, where the first try runs out of memory."""
    run = trainer(tmp_path, max_steps=3, auto_find_batch_size=True)
    calls: list[int] = []
    kept = type(run).compute_loss

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(run.state.global_step)
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory.")
        return kept(*args, **kwargs)

    fails_once.__module__ = kept.__module__
    type(run).compute_loss = fails_once  # type: ignore[method-assign]
    run._why_own_loss = lambda: "a test"  # type: ignore[method-assign]
    try:
        run.train()
    finally:
        type(run).compute_loss = kept  # type: ignore[method-assign]
    assert calls[:4] == [0, 1, 2, 0]
    logged = [entry["step"] for entry in run.state.log_history if "loss" in entry]
    assert logged[-3:] == [1, 2, 3] and list(run._ledger.steps)[-3:] == [1, 2, 3]


class Counts(SFTTrainer):
    """Adds a figure of its own to logs, as TRL's trainers do."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self._metrics["train"]["own"].append(float(self.state.global_step))
        return super().compute_loss(*args, **kwargs)


def test_figures_of_a_subclass_stay_with_their_step(tmp_path: Path, waited_for: None) -> None:
    run = Counts(
        model=adapter_model(),
        args=settings(tmp_path, max_steps=3),
        train_dataset=chats(),
        processing_class=tiny_tokenizer(),
    )
    run.train()
    assert [entry["own"] for entry in run.state.log_history if "loss" in entry] == [0.0, 1.0, 2.0]


def test_numbers_are_those_of_when_they_were_sent(device: torch.device) -> None:
    value = torch.tensor(2.5, device=device)
    count = torch.tensor(2**40 + 1, device=device)
    sent = Sent.of([value, 3, count, math.nan])
    value.zero_()
    read = sent.read()
    assert read[:3] == [2.5, 3.0, 2.0**40 + 1] and math.isnan(read[3])
    assert Sent.of([]).read() == []
