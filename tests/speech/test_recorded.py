"""Speech steps of static shape: recorded, rounded up and in parts they train alike."""

from __future__ import annotations

import pytest
import torch

from pronghorn.engine import TrainingStep
from pronghorn.memory import estimate
from pronghorn.speech.memory import SpeechMemory
from pronghorn.training.steps import StaticSteps
from tests.engine.recorded import pretend_to_record
from tests.speech.test_trainer import folder, gradients_of, make  # noqa: F401


def close(found, expected, logs):
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name in ("loss", "token_loss", "code_loss", "token_accuracy", "code_accuracy"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4), name


@pytest.mark.parametrize("rows_a_batch", [4, 1])
def test_recorded_steps_train_as_ordinary_ones(folder, tmp_path, monkeypatch, rows_a_batch):  # noqa: F811
    given = {
        "per_device_train_batch_size": rows_a_batch,
        "gradient_accumulation_steps": 4 // rows_a_batch,
        "max_grad_norm": 0.0,
    }
    ordinary = make(folder, tmp_path, **given)
    ordinary._static_steps()._why_not = "asked for by the test"
    expected, wanted = gradients_of(ordinary)
    pretend_to_record(monkeypatch)
    monkeypatch.setattr(StaticSteps, "captures", True)
    recorded = make(folder, tmp_path, **given)
    found, log = gradients_of(recorded)
    assert recorded._steps._step.captured and recorded._steps._step.reason is None
    close(found, expected, (log, wanted))


def test_a_batch_that_does_not_fit_is_the_same_in_parts(folder, tmp_path, monkeypatch, caplog):  # noqa: F811
    given = {"per_device_train_batch_size": 4, "max_grad_norm": 0.0}
    expected, wanted = gradients_of(make(folder, tmp_path, **given))
    execute = TrainingStep._execute

    def short(self, batch, counts):
        if batch["cu_seq_lens_q"].numel() > 3:
            raise torch.OutOfMemoryError("as the test wants it")
        return execute(self, batch, counts)

    monkeypatch.setattr(TrainingStep, "_execute", short)
    found, log = gradients_of(make(folder, tmp_path, **given))
    assert "run in parts" in caplog.text
    close(found, expected, (log, wanted))


def test_a_budget_chooses_levels_for_both(folder, tmp_path):  # noqa: F811
    run = make(folder, tmp_path, rows=6, per_device_train_batch_size=3)
    memory = SpeechMemory(run)
    batch = memory.largest()
    assert batch.tokens >= max(len(row["input_ids"]) for row in run.train_dataset) * 3
    plenty = memory.plan("64GiB", batch)
    assert {b.save_levels[0] for b in memory.bindings} == {"all"}
    assert plenty.estimate.reserved > estimate_of_slow(memory).reserved, "the fast transformer is in it"
    memory.rehearse(TrainingStep(run.model, capture=False, task=memory.task()), batch)


def estimate_of_slow(memory):
    from pronghorn.engine.planning import shape_of

    return estimate(shape_of(memory.bindings[0]), "all", memory.largest())
