"""Who chooses the save levels: the user, a budget, or by itself what the memory has room for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pronghorn import FastLanguageModel
from pronghorn.blocks import kept_bytes_per_token
from pronghorn.engine import AUTO, binding_of
from pronghorn.engine.planning import shape_of
from pronghorn.errors import BudgetInvalid, BudgetTooSmall, OutOfMemory
from pronghorn.hardware import GpuMemory
from pronghorn.memory import Batch, parse_budget
from pronghorn.training import memory
from tests.training.runs import adapter_model, losses, trainer

GIB = 2**30
BATCH = Batch(64, 64, 2)


def levels(model) -> set[str]:
    return set(binding_of(model).save_levels)


@pytest.mark.parametrize("level", ["all", "attention", "none"])
def test_without_a_gpu_layers_keep_what_the_host_has_room_for(tmp_path, monkeypatch, level) -> None:
    model = adapter_model()
    binding = binding_of(model)
    binding.set_save_levels(AUTO)
    assert levels(model) == {"offload"}, "the leanest until the batch is known"
    run = trainer(tmp_path, model)
    kept = kept_bytes_per_token(level, shape_of(binding).widths) * memory.largest_batch(run).tokens
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 2 * kept * len(binding.layers))
    run.train()
    assert levels(model) == {level} and losses(run)


@pytest.mark.parametrize(("asked", "level"), [("unsloth", "offload"), (True, "none"), ("matmuls", "matmuls")])
def test_what_the_user_chose_stays(tmp_path, asked, level) -> None:
    model = adapter_model()
    FastLanguageModel.for_training(model, use_gradient_checkpointing=asked)
    trainer(tmp_path, model).train()
    assert levels(model) == {level}


def test_asking_the_trainer_for_checkpointing_is_a_choice(tmp_path) -> None:
    model = adapter_model()
    binding_of(model).set_save_levels(AUTO)
    trainer(tmp_path, model, gradient_checkpointing=True).train()
    assert levels(model) == {"none"}


class Plans:
    """Plans and rehearsals of a GPU that is not there; rehearsals fail while `failures` lasts."""

    def __init__(self, monkeypatch, automatic: bool, budget=None, failures: int = 0, batch=BATCH, least=0):
        self.budgets: list = []
        self.failures, self.least = failures, least
        self.binding = SimpleNamespace(bound=True, automatic=automatic, layers=[])
        args = SimpleNamespace(device=torch.device("cuda"), memory_budget=budget)
        self.trainer = SimpleNamespace(args=args, model=None)
        monkeypatch.setattr(memory, "binding_of", lambda model: self.binding)
        monkeypatch.setattr(memory, "largest_batch", lambda trainer: batch)
        monkeypatch.setattr(memory, "_plan", self.plan)
        monkeypatch.setattr(memory, "_rehearse", self.rehearse)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(memory, "gpu_memory", lambda device: GpuMemory(8 * GIB, GIB, 2 * GIB))

    def plan(self, run, budget, batch):
        self.budgets.append(budget)
        if self.least > (budget if isinstance(budget, int) else 2 * GIB):
            raise BudgetTooSmall("a step does not fit", fix="as the test wants it")
        limit = parse_budget(budget, 2 * GIB)
        return SimpleNamespace(budget=limit, estimate=SimpleNamespace(reserved=1000))

    def rehearse(self, run, step, batch) -> None:
        if self.failures:
            self.failures -= 1
            raise torch.OutOfMemoryError("as the test wants it")

    def take(self) -> list:
        memory.take_memory(memory.RunMemory(self.trainer), None)
        return self.budgets


def test_what_nobody_chose_is_planned_and_rehearsed_until_it_fits(monkeypatch) -> None:
    assert Plans(monkeypatch, automatic=True).take() == [AUTO]
    assert Plans(monkeypatch, automatic=True, failures=2).take() == [AUTO, 900, 750]
    with pytest.raises(torch.OutOfMemoryError):
        Plans(monkeypatch, automatic=True, failures=3).take()


def test_what_fits_only_without_the_usual_headroom_is_rehearsed_like_that(monkeypatch) -> None:
    assert Plans(monkeypatch, automatic=True, least=5 * GIB // 2).take() == [AUTO, 3 * GIB]
    with pytest.raises(BudgetTooSmall):
        Plans(monkeypatch, automatic=True, least=4 * GIB).take()


def test_a_users_levels_are_planned_anew_only_where_they_do_not_fit(monkeypatch) -> None:
    assert Plans(monkeypatch, automatic=False).take() == []
    assert Plans(monkeypatch, automatic=False, failures=1).take() == [AUTO]


def test_a_budget_that_others_use_up_is_an_error_with_the_numbers(monkeypatch) -> None:
    with pytest.raises(OutOfMemory, match=r"memory_budget=4GiB: .* 3.00 of the GPU's 8.00 GiB"):
        Plans(monkeypatch, automatic=True, budget="4GiB", failures=1).take()


def test_a_plan_that_takes_more_than_it_said_is_made_again_with_less(monkeypatch) -> None:
    assert Plans(monkeypatch, automatic=True, budget="2GiB").take() == ["2GiB"]
    assert Plans(monkeypatch, automatic=True, budget="2GiB", failures=2).take() == ["2GiB", 900, 750]


def test_a_stream_of_unknown_length(monkeypatch) -> None:
    assert Plans(monkeypatch, automatic=True, batch=None).take() == []
    with pytest.raises(BudgetInvalid, match="longest row"):
        Plans(monkeypatch, automatic=True, budget=AUTO, batch=None).take()


@pytest.mark.parametrize("budget", ["potatoes", "0GiB", -1])
def test_what_is_no_size_is_refused_without_a_gpu_too(tmp_path, budget) -> None:
    with pytest.raises(BudgetInvalid, match="no memory size"):
        trainer(tmp_path, adapter_model(), memory_budget=budget)


@pytest.mark.parametrize(
    ("automatic", "budget", "asked"),
    [(True, None, [AUTO]), (True, "2GiB", ["2GiB"]), (False, "2GiB", ["2GiB"]), (False, None, [])],
)
def test_weights_move_together_before_steps_are_laid_out(monkeypatch, automatic, budget, asked) -> None:
    plans, done = Plans(monkeypatch, automatic=automatic, budget=budget), []
    monkeypatch.setattr(memory, "gather_for", lambda binding, budget, batch: done.append(budget))
    step = SimpleNamespace(lay_out=lambda: done.append("laid out"))
    memory.take_memory(memory.RunMemory(plans.trainer), step)
    assert done == [*asked, "laid out"]
    done.clear()
    plans.take()
    assert not done, "without steps of our own nothing moves"
