"""The trainer's micro-batches as steps of static shape: the same training, and a reason where it is done otherwise."""

from __future__ import annotations

import pytest
import torch

from pronghorn.engine import TrainingStep, binding_of
from pronghorn.errors import OutOfMemory
from pronghorn.training import SFTTrainer
from tests.tiny import tiny_tokenizer
from tests.training.runs import adapter_model, chats, losses, settings, trainer

ON_GPU = {"use_cpu": False, "dataloader_pin_memory": True}
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def ordinary(run: SFTTrainer) -> SFTTrainer:
    """The same run with every micro-batch through the model's ordinary call and autograd."""
    run._static_steps()._why_not = "asked for by the test"
    return run


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 3}, {"packing": True, "max_length": 64}]
)
def test_static_steps_train_as_the_ordinary_way(tmp_path, options) -> None:
    given = {"max_steps": 4, "max_grad_norm": 1.0, "optim": "adamw_torch", "learning_rate": 1e-3, **options}
    runs = [
        trainer(tmp_path / "a", adapter_model(), rows=chats(24), **given),
        ordinary(trainer(tmp_path / "b", adapter_model(), rows=chats(24), **given)),
    ]
    for run in runs:
        run.train()
    assert runs[0]._steps._step is not None and runs[1]._steps._step is None
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    for (name, a), (_, b) in zip(*(run.model.named_parameters() for run in runs), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name


def test_a_loss_of_ones_own_takes_the_ordinary_way(tmp_path) -> None:
    class Halved(SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * 0.5

    run = Halved(
        model=adapter_model(),
        args=settings(tmp_path),
        train_dataset=chats(),
        processing_class=tiny_tokenizer(),
    )
    run.train()
    plain = trainer(tmp_path / "plain", adapter_model())
    plain.train()
    assert "Halved computes its loss itself" in run._steps._why_not
    assert losses(run)[0] == pytest.approx(losses(plain)[0] / 2, rel=1e-5)


class TestCaptured:
    pytestmark = gpu

    @pytest.mark.parametrize("level", ["all", "none", "offload", "offload-attention"])
    @pytest.mark.parametrize(
        "options", [{"gradient_accumulation_steps": 2}, {"packing": True, "max_length": 128}]
    )
    def test_a_captured_run_trains_as_an_eager_one(self, tmp_path, level, options) -> None:
        found = {}
        for graphs in (True, False):
            model = adapter_model().to("cuda", torch.bfloat16)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
            binding_of(model).set_save_levels(level)
            given = {"max_steps": 6, "max_grad_norm": 1.0, "cuda_graphs": graphs, **ON_GPU, **options}
            run = trainer(tmp_path / str(graphs), model, rows=chats(24), **given)
            run.train()
            assert (run._steps._step.captured > 0) == graphs
            found[graphs] = losses(run)
        assert found[True] == pytest.approx(found[False], rel=0.01)

    def test_evaluation_in_between_changes_nothing(self, tmp_path) -> None:
        found = []
        for evaluate in (True, False):
            model = adapter_model().to("cuda", torch.bfloat16)
            options = {"eval_strategy": "steps", "eval_steps": 2} if evaluate else {}
            options |= {"eval_dataset": chats(6), "max_steps": 6, **ON_GPU}
            run = trainer(tmp_path / str(evaluate), model, rows=chats(24), **options)
            run.train()
            assert run._steps._step.captured
            found.append(losses(run))
        assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_batch_that_does_not_fit_is_trained_in_parts(tmp_path, monkeypatch, caplog, accumulation) -> None:
    """Memory "runs out" for more than 100 tokens; what is trained is the same to rounding."""
    options = {"max_steps": 3, "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 6}
    whole = trainer(tmp_path / "whole", adapter_model(), rows=chats(24), **options)
    whole.train()
    run_whole = TrainingStep._execute
    sizes = []

    def execute(self, batch, normalizer):
        output = run_whole(self, batch, normalizer)
        if batch["input_ids"].numel() > 100:
            raise torch.OutOfMemoryError("as the test wants it")
        sizes.append(batch["input_ids"].numel())
        return output

    monkeypatch.setattr(TrainingStep, "_execute", execute)
    # A CPU has no such error of its own, so gradients are guarded on a GPU alone.
    monkeypatch.setattr("pronghorn.engine.step._guards", lambda device: True)
    run = trainer(tmp_path / "parts", adapter_model(), rows=chats(24), **options)
    run.train()
    assert len(sizes) > 3 * accumulation and max(sizes) <= 100
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    assert "run in parts" in caplog.text
    for (name, a), (_, b) in zip(*(r.model.named_parameters() for r in (run, whole)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6), name


def test_one_document_that_does_not_fit_is_an_error_with_a_fix(tmp_path, monkeypatch) -> None:
    def execute(self, batch, normalizer):
        raise torch.OutOfMemoryError("as the test wants it")

    monkeypatch.setattr(TrainingStep, "_execute", execute)
    run = trainer(tmp_path, adapter_model())
    with pytest.raises(OutOfMemory, match="memory_budget='auto'"):
        run.train()


def test_a_memory_budget_has_no_effect_on_a_cpu(tmp_path, caplog) -> None:
    model = adapter_model()
    run = trainer(tmp_path, model, memory_budget="auto")
    run.train()
    assert "memory_budget=auto is for a GPU's memory" in caplog.text
    assert set(binding_of(model).save_levels) == {"all"} and losses(run)


def test_an_evaluation_that_does_not_fit_beside_graphs_is_done_without_them(
    tmp_path, monkeypatch, caplog
) -> None:
    run = trainer(tmp_path, adapter_model(), eval_dataset=chats(4))
    run.train()
    released, failures = [], [torch.OutOfMemoryError("as the test wants it")]
    whole = run.prediction_step

    def predict(*args, **kwargs):
        if failures:
            raise failures.pop()
        return whole(*args, **kwargs)

    monkeypatch.setattr(run, "prediction_step", predict)
    monkeypatch.setattr(run._steps, "release", lambda: released.append(1))
    with pytest.raises(torch.OutOfMemoryError):
        run.evaluate()
    failures.append(torch.OutOfMemoryError("again"))
    monkeypatch.setattr(TrainingStep, "holds_graphs", True)
    assert run.evaluate()["eval_loss"] > 0
    assert released == [1] and "no room beside the captured steps" in caplog.text
