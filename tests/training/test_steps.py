"""The trainer's micro-batches as steps of static shape: the same training, and a reason where it is done otherwise."""

from __future__ import annotations

import pytest
import torch

from pronghorn.engine import binding_of
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
