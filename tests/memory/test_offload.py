"""Parked layer inputs come back unchanged, and the GPU holds less meanwhile."""

from __future__ import annotations

import pytest
import torch

from tests.families.parity import add_adapter, assert_same, bound_copy, rows_batch, run
from tests.tiny import tiny_model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="parking needs a GPU to park from")


@needs_gpu
@pytest.mark.gpu
def test_offloaded_gradients_are_bitwise_those_of_none() -> None:
    model = add_adapter(tiny_model("llama", num_hidden_layers=4)).cuda()
    batch = {k: v.cuda() for k, v in rows_batch(model.config.vocab_size, (64, 64, 64)).items()}
    for _ in range(3):  # pinned blocks are reused from the second pass on
        assert_same(run(bound_copy(model, "offload"), batch), run(bound_copy(model, "none"), batch), 0.0)


@needs_gpu
@pytest.mark.gpu
def test_parked_inputs_leave_the_gpu() -> None:
    from pronghorn.memory import HostStash

    stash = HostStash(torch.cuda.Stream())
    before = torch.cuda.memory_allocated()
    tensors = [torch.randn(1 << 20, device="cuda") for _ in range(4)]
    copies = [t.clone().cpu() for t in tensors]
    indices = [stash.park(t) for t in tensors]
    del tensors
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    for index, expected in reversed(list(zip(indices, copies, strict=True))):
        assert torch.equal(stash.fetch(index, torch.device("cuda")).cpu(), expected)


def test_without_a_gpu_offload_is_none() -> None:
    model = add_adapter(tiny_model("llama"))
    batch = rows_batch(model.config.vocab_size, (9, 4))
    assert_same(run(bound_copy(model, "offload"), batch), run(bound_copy(model, "none"), batch), 0.0)
