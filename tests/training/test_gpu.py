"""On a GPU: a step asks the device for nothing before it is logged, and trains as on the CPU."""

from __future__ import annotations

import pytest
import torch

from tests.training.runs import adapter_model, chats, losses, trainer

ON_GPU = {"use_cpu": False, "dataloader_pin_memory": True, "packing": True, "max_length": 128}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_loss_and_gradient_do_not_wait_for_the_device(tmp_path):
    run = trainer(tmp_path, adapter_model().to("cuda", torch.bfloat16), rows=chats(12), **ON_GPU)
    run.train()  # compiles kernels and picks the attention backend
    batches = [run._prepare_inputs(batch) for batch in run.get_train_dataloader()]
    assert all(parameter.is_cuda for parameter in run.model.parameters())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        count = run._get_num_items_in_batch(batches, torch.device("cuda"))
        for batch in batches:
            run.compute_loss(run.model, batch, num_items_in_batch=count).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bfloat16_on_the_gpu_is_near_float32(tmp_path):
    runs = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = adapter_model().to("cuda", dtype)
        runs[name] = trainer(tmp_path / name, model, rows=chats(12), max_steps=3, **ON_GPU)
        runs[name].train()
    assert losses(runs["bfloat16"]) == pytest.approx(losses(runs["float32"]), rel=0.02)
    assert runs["bfloat16"].state.log_history[0]["peak_memory_gib"] > 0


def test_float16_trains_with_scaled_gradients(tmp_path):
    """As on GPUs before Ampere: float16 weights, float32 adapters, gradients scaled without being asked."""
    runs = {}
    for name, dtype in (("float32", torch.float32), ("float16", torch.float16)):
        model = adapter_model().to("cuda", dtype)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        runs[name] = trainer(tmp_path / name, model, rows=chats(12), max_steps=8, **ON_GPU)
        runs[name].train()
    assert runs["float16"].accelerator.scaler is not None
    # The scale starts at 65,536 and skips steps until it fits, so the curves are compared at their beginning.
    assert losses(runs["float16"])[0] == pytest.approx(losses(runs["float32"])[0], rel=0.01)
    assert losses(runs["float16"])[-1] < losses(runs["float16"])[0]
