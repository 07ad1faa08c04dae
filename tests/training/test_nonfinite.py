"""A loss that is no number: told once with its place, raised where a weight is the cause, kept out of the weights."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from pronghorn.engine import StepOutput
from pronghorn.errors import NonFiniteLoss
from pronghorn.training import SFTTrainer
from pronghorn.training import nonfinite as watched
from pronghorn.training.steps import StaticSteps
from tests.tiny import tiny_tokenizer
from tests.training.runs import adapter_model, losses, settings, trainer


def plain(rows: list[str], folder: Any, model: Any, **options: Any) -> SFTTrainer:
    return SFTTrainer(
        model,
        args=settings(folder, **options),
        train_dataset=Dataset.from_list([{"text": row} for row in rows]),
        processing_class=tiny_tokenizer(),
    )


def told(caplog: Any) -> list[str]:
    return [r.getMessage() for r in caplog.records if "learning_rate" in r.getMessage()]


def test_a_weight_ends_the_run_before_it_is_updated(tmp_path):
    model = adapter_model()
    name, weight = next((n, p) for n, p in model.named_parameters() if "layers.1" in n and "lora_B" in n)
    with torch.no_grad():
        weight[2, 1] = float("nan")
    before = weight.detach().clone()
    # A GPU's verdict comes after the update, which a fused optimizer leaves out.
    run = trainer(tmp_path, model, max_steps=3, optim="adamw_torch_fused")
    with pytest.raises(NonFiniteLoss) as failed:
        run.train()
    said = str(failed.value)
    assert said.startswith(
        f"[PH701] the loss is nan at step 1: {name} has a value that is nan (first at [2, 1])"
    )
    assert "checkpoint" in failed.value.fix
    assert torch.equal(weight.isnan(), before.isnan())


@pytest.mark.parametrize("packing", [False, True])
def test_the_row_of_the_data_and_the_token_are_named(tmp_path, packing):
    rows = ["grass and sagebrush", "the fastest land animal", "what does it eat?", "North America"]
    tokenizer, model = tiny_tokenizer(), adapter_model()
    ids = [tokenizer(row)["input_ids"] for row in rows]
    token = next(t for t in ids[2] if all(t not in other for other in (ids[0], ids[1], ids[3])))
    with torch.no_grad():
        model.get_input_embeddings().weight[token, 3] = float("inf")
    run = plain(rows, tmp_path, model, packing=packing, max_length=64, shuffle_dataset=False)
    with pytest.raises(NonFiniteLoss) as failed:
        run.train()
    said = failed.value.message
    assert f"embed_tokens.weight has a value that is inf (first at [{token}, 3])" in said
    assert f"number {ids[2].index(token)} {tokenizer.decode([token])!r} (id {token})" in said
    # Of the data as it was given: packing puts its documents elsewhere.
    assert "of row 2 of the training data" in said


def test_another_cause_is_told_once_and_training_goes_on(tmp_path, caplog, monkeypatch):
    right = StaticSteps.run

    def sometimes(self, inputs, normalizer):
        output = right(self, inputs, normalizer)
        return StepOutput(output.loss * float("nan"), output.num_correct)

    monkeypatch.setattr(StaticSteps, "run", sometimes)
    run = trainer(tmp_path, max_steps=3)
    with caplog.at_level(logging.WARNING, "pronghorn"):
        run.train()
    (said,) = told(caplog)
    assert "[PH701] the loss is nan at step 1" in said and "every tensor is finite" in said
    assert run.state.global_step == 3 and losses(run)[0] != losses(run)[0]


def test_an_explanation_that_fails_hides_nothing(tmp_path, caplog, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(watched, "find_nonfinite", fails)
    model = adapter_model()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    run = trainer(tmp_path, model, max_steps=2)
    with caplog.at_level(logging.WARNING, "pronghorn"):
        run.train()
    (said,) = told(caplog)
    assert "the loss is nan at step 1" in said and "no memory left" in said


def test_weights_that_are_spread_over_processes_are_not_searched(tmp_path, caplog):
    """One process that runs a batch by itself would wait for the others' shards."""
    model = adapter_model()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    run = trainer(tmp_path, model, max_steps=1)
    watch = run._numbers
    run.is_fsdp_enabled = True
    with caplog.at_level(logging.WARNING, "pronghorn"):
        watch.saw({"input_ids": torch.zeros(1, 2, dtype=torch.int64)}, 1, torch.tensor(float("nan")))
    (said,) = told(caplog)
    assert "spread over processes" in said


class SpoilsOneGradient(TrainerCallback):
    """Makes the gradient of step 2 no number, and keeps the weights after every step."""

    def __init__(self, model: Any) -> None:
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.after: list[list[torch.Tensor]] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.after.append([p.detach().clone() for p in self.weights])


@pytest.mark.parametrize("optim,kept", [("adamw_torch_fused", True), ("adamw_torch", False)])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_fused_optimizer_leaves_weights_alone(tmp_path, monkeypatch, optim, kept, clip, caplog):
    model = adapter_model()
    run = trainer(tmp_path, model, max_steps=3, optim=optim, max_grad_norm=clip, learning_rate=0.01)
    seen = SpoilsOneGradient(model)
    run.add_callback(seen)
    right = SFTTrainer.training_step

    def spoiling(self, *args, **kwargs):
        loss = right(self, *args, **kwargs)
        if self.state.global_step == 1:
            seen.weights[0].grad[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(SFTTrainer, "training_step", spoiling)
    if not kept:
        # What comes after is lost: the next loss is no number, and the weights are named.
        with pytest.raises(NonFiniteLoss, match="at step 3"):
            run.train()
        assert any(p.isnan().any() for p in seen.weights)
        return
    with caplog.at_level(logging.WARNING, "pronghorn"):
        run.train()
    first, second, third = seen.after
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(second, third, strict=True))
    assert all(p.isfinite().all() for p in third)
    (said,) = told(caplog)
    assert "the gradient norm is nan at step 2" in said


def test_good_losses_change_nothing(tmp_path, caplog):
    plain_run, watched_run = (
        trainer(tmp_path / name, max_steps=3, optim="adamw_torch_fused", learning_rate=0.01) for name in "ab"
    )
    plain_run.remove_callback(plain_run._numbers)
    plain_run.train()
    with caplog.at_level(logging.WARNING, "pronghorn"):
        watched_run.train()
    assert losses(plain_run) == losses(watched_run) and not told(caplog)
    assert not watched_run._numbers._unread
