"""Batches with images: the tower eagerly, the decoder on embeddings of a static shape; the same training."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("PIL")

from pronghorn.training import SFTTrainer
from pronghorn.training.steps import StaticSteps
from tests.engine.recorded import pretend_to_record
from tests.tiny_vision import chat_rows, tiny_processor
from tests.training.runs import losses, settings
from tests.training.test_vision import TEXT, adapted

EVERYWHERE = (
    r".*(language_model.*|visual.*(attn|linear_fc1)|vision_tower.*)\.(q_proj|down_proj|qkv|linear_fc1)"
)


def run(folder, kind, targets, rows):
    options = {"max_steps": 4, "per_device_train_batch_size": 3, "max_length": 128}
    made = SFTTrainer(
        model=adapted(kind, targets=targets),
        args=settings(folder, **options),
        train_dataset=rows,
        processing_class=tiny_processor(kind),
    )
    made.train()
    return made


@pytest.mark.parametrize("targets", [TEXT, EVERYWHERE], ids=["text", "everywhere"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_recorded_steps_train_as_eager_ones(tmp_path, monkeypatch, kind, targets):
    """Also where adapters on the tower get their gradients through the embeddings."""
    rows = chat_rows() * 4
    eager = run(tmp_path / "eager", kind, targets, rows)
    pretend_to_record(monkeypatch)
    monkeypatch.setattr(StaticSteps, "captures", True)
    recorded = run(tmp_path / "recorded", kind, targets, rows)
    step = recorded._steps._step
    assert 0 < step.captured <= 3, "few shapes of batches"
    assert losses(recorded) == pytest.approx(losses(eager), rel=1e-5)
    for (name, a), (_, b) in zip(*(r.model.named_parameters() for r in (recorded, eager)), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_the_rehearsal_of_images_is_a_batch_of_images(tmp_path, monkeypatch, kind):
    """Its sizes are those of real batches, so that the graph it leaves is theirs."""
    made = SFTTrainer(
        model=adapted(kind),
        args=settings(tmp_path, per_device_train_batch_size=1, max_length=128),
        train_dataset=chat_rows(),
        processing_class=tiny_processor(kind),
    )
    pretend_to_record(monkeypatch)
    monkeypatch.setattr(StaticSteps, "captures", True)
    task = made._static_steps()._memory.task()
    batch = next(iter(made.get_train_dataloader()))
    with torch.no_grad():
        real = task.inputs(made._prepare_inputs(batch))
    sizes = (real["labels"].shape[1], real["loss_rows"].shape[0], real["cu_seq_lens_q"].shape[0] - 1)
    nonsense = task.nonsense(torch.device("cpu"), *sizes, longest=sizes[0], images=True)
    described = {
        n: (x.dtype, x.dim(), x.shape[-1]) for n, x in task.inputs(nonsense).items() if n != "visual_rows"
    }
    assert described == {n: (x.dtype, x.dim(), x.shape[-1]) for n, x in real.items() if n != "visual_rows"}
