"""A training leaves what was there before out of Python's collections, where no garbage can hold the GPU's memory."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import TrainerCallback

from pronghorn.training import safe
from tests.training.runs import adapter_model, trainer


class Frozen(TrainerCallback):
    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step_end(self, *args, **kwargs) -> None:
        self.counts.append(gc.get_freeze_count())


@pytest.mark.parametrize("alone", [True, False])
def test_while_it_trains_and_no_longer(tmp_path, monkeypatch, alone) -> None:
    gc.unfreeze()
    monkeypatch.setattr(safe, "is_alone_on_gpu", lambda model, device: alone)
    run, frozen = trainer(tmp_path, adapter_model()), Frozen()
    run.add_callback(frozen)
    run.train()
    assert len(frozen.counts) == 1 and (frozen.counts[0] > 0) is alone
    assert gc.get_freeze_count() == 0


def test_a_cpu_is_never_held_by_a_model_alone() -> None:
    assert not safe.is_alone_on_gpu(torch.nn.Linear(2, 2), torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_garbage_on_the_gpu_is_seen() -> None:
    torch.cuda.empty_cache()
    device, mib = torch.device("cuda", torch.cuda.current_device()), 2**20 // 4
    others = torch.cuda.memory_allocated(device) // 2**20
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.empty((100 + 20 * others) * mib, device=device))
    model.tied = model.weight
    assert safe.is_alone_on_gpu(model, device)
    garbage = torch.empty((300 + 2 * others) * mib, device=device)
    assert not safe.is_alone_on_gpu(model, device)
    del garbage
