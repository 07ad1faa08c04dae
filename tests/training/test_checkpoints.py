"""Checkpoints resume to the bit, are complete or not there, and the newest is pointed to."""

from __future__ import annotations

import errno
import json
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from pronghorn.errors import CheckpointMissing, ResumeMismatch, SaveFailed
from pronghorn.training.checkpoints import checkpoint_at, is_complete, newest_checkpoint, point_to
from tests.tiny import tiny_model
from tests.training.runs import adapter_model, chats, losses, trained, trainer

RUN = {
    "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "adamw_torch",
    "learning_rate": 1e-2, "lr_scheduler_type": "linear", "max_grad_norm": 1.0, "save_strategy": "steps",
}  # fmt: skip


class StopAt(TrainerCallback):
    """Ends training after a step, as a user's Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_resuming_gives_the_same_curve_to_the_bit(tmp_path, packing):
    options = {**RUN, "packing": packing, "max_length": 128, "save_steps": 3}
    rows = chats(30)
    whole = trainer(tmp_path / "whole", adapter_model(dropout=0.1), rows, **options)
    whole.train()
    first = trainer(tmp_path / "parts", adapter_model(dropout=0.1), rows, callbacks=[StopAt(3)], **options)
    first.train()
    assert len(losses(first)) == 3
    # Whatever happened to the random state in between must not matter.
    torch.manual_seed(99)
    second = trainer(tmp_path / "parts", adapter_model(dropout=0.1, seed=7), rows, **options)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(whole)
    expected = trained(whole.model)
    for name, value in trained(second.model).items():
        assert torch.equal(value, expected[name]), name


def test_last_checkpoint_and_limit(tmp_path):
    run = trainer(tmp_path, **{**RUN, "max_steps": 3, "save_steps": 1, "save_total_limit": 2})
    run.train()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["README.md", "checkpoint-2", "checkpoint-3", "last_checkpoint"]
    assert (tmp_path / "last_checkpoint").readlink().as_posix() == "checkpoint-3"
    assert is_complete(tmp_path / "last_checkpoint")
    again = trainer(tmp_path, **{**RUN, "max_steps": 4, "save_steps": 1, "save_total_limit": 2})
    again.train(resume_from_checkpoint=str(tmp_path / "last_checkpoint"))
    assert (tmp_path / "last_checkpoint").readlink().as_posix() == "checkpoint-4"
    # Saved over a checkpoint of the same step.
    trainer(tmp_path, **{**RUN, "max_steps": 4, "save_steps": 4}).train()
    assert is_complete(tmp_path / "checkpoint-4")
    assert not (tmp_path / ".unfinished").exists()


def test_the_best_checkpoint_is_named_where_it_is(tmp_path):
    run = trainer(
        tmp_path, eval_dataset=chats(3),
        **{**RUN, "max_steps": 3, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
           "load_best_model_at_end": True, "save_total_limit": 1},
    )  # fmt: skip
    run.train()
    best = run.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{run.state.best_global_step}")
    state = json.loads((tmp_path / "last_checkpoint" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].startswith(str(tmp_path / "checkpoint-"))


def test_incomplete_checkpoints_are_passed_over(tmp_path, caplog):
    run = trainer(tmp_path, **{**RUN, "max_steps": 2, "save_steps": 1})
    run.train()
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    with caplog.at_level(logging.WARNING, "pronghorn"):
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert "checkpoint-2 is incomplete" in caplog.text
    with pytest.raises(CheckpointMissing, match=r"PH603.*incomplete"):
        checkpoint_at(tmp_path / "checkpoint-2")
    shutil.rmtree(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointMissing, match="no complete checkpoint"):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointMissing, match="no such checkpoint"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_pointer_where_links_are_not_supported(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()

    def refuse(*args, **kwargs):
        raise OSError("no links here")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    point_to(checkpoint)
    assert (tmp_path / "last_checkpoint").read_text() == "checkpoint-5\n"
    with pytest.raises(CheckpointMissing, match="incomplete"):
        checkpoint_at(tmp_path / "last_checkpoint")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError(
            "[enforce fail at inline_container.cc:603] . PytorchStreamWriter failed writing file data/0"
        ),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk_leaves_no_half_checkpoint(tmp_path, monkeypatch, error):
    run = trainer(tmp_path, **{**RUN, "max_steps": 2, "save_steps": 1})

    def save(output_dir):
        if run.state.global_step == 2:
            raise error

    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", save)
    with pytest.raises(SaveFailed, match=r"PH601.*checkpoint-2 could not be written: the disk is full"):
        run.train()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["README.md", "checkpoint-1", "last_checkpoint"]
    assert newest_checkpoint(tmp_path).name == "checkpoint-1"


def test_a_finished_run_has_nothing_left_to_train(tmp_path):
    """Transformers looks at max_steps after a step only, and would train one more."""
    options = {**RUN, "max_steps": 2, "save_steps": 2}
    whole = trainer(tmp_path, **options)
    whole.train()
    again = trainer(tmp_path, **options)
    assert again.train(resume_from_checkpoint=True).global_step == again.state.global_step == 2
    for name, value in trained(whole.model).items():
        assert torch.equal(trained(again.model)[name], value)


def test_the_last_run_is_resumed_and_not_a_longer_one_before(tmp_path):
    trainer(tmp_path, **{**RUN, "max_steps": 4, "save_steps": 2}).train()
    trainer(tmp_path, **{**RUN, "max_steps": 2, "save_steps": 1}).train()
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"


def test_other_errors_while_saving_stay_what_they_are(tmp_path, monkeypatch):
    run = trainer(tmp_path, **{**RUN, "max_steps": 1, "save_steps": 1})

    def save(output_dir):
        raise ZeroDivisionError

    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", save)
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / ".unfinished").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    run = trainer(tmp_path / "runs")
    with pytest.raises(SaveFailed, match="PH601"):
        run.save_model(str(tmp_path / "file" / "model"))


def test_another_adapters_checkpoint_is_refused_by_name(tmp_path):
    options = {**RUN, "max_steps": 2, "save_steps": 1}
    trainer(tmp_path, **options).train()
    model = tiny_model("llama")
    other = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj"]))
    with pytest.raises(ResumeMismatch, match="another one than this run trains") as refused:
        trainer(tmp_path, other, **{**options, "max_steps": 4}).train(resume_from_checkpoint=True)
    assert "r is 4 there and 8 here" in refused.value.message
    assert "target_modules is ['down_proj', 'q_proj', 'v_proj'] there" in refused.value.message
    with pytest.raises(ResumeMismatch, match="holds an adapter, and this run trains all weights"):
        trainer(tmp_path, tiny_model("llama"), **options).train(resume_from_checkpoint=True)
