"""Parked layer inputs come back unchanged, and the GPU holds less meanwhile."""

from __future__ import annotations

import pytest
import torch

from pronghorn.memory.offload import LAG
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
    before, size = torch.cuda.memory_allocated(), 4 << 20
    copies, indices = [], []
    torch.cuda.reset_peak_memory_stats()
    for seed in range(8):
        generator = torch.Generator("cuda").manual_seed(seed)
        tensor = torch.randn(1 << 20, device="cuda", generator=generator)
        copies.append(tensor.cpu())
        indices.append(stash.park(tensor))
        del tensor
    # Stream order, not luck: without any synchronisation never more than the ones on their way out and a new one.
    assert torch.cuda.max_memory_allocated() <= before + (LAG + 1) * size
    assert torch.cuda.memory_allocated() == before + LAG * size
    for index, expected in reversed(list(zip(indices, copies, strict=True))):
        assert torch.equal(stash.fetch(index, torch.device("cuda")).cpu(), expected)
    assert torch.cuda.memory_allocated() == before


@needs_gpu
@pytest.mark.gpu
def test_host_ahead_of_the_gpu_holds_no_more() -> None:
    """A thousand layers are enqueued while the first copy has hardly begun."""
    from pronghorn.memory import HostStash

    stash, size = HostStash(torch.cuda.Stream()), 4 << 20
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda._sleep(200_000_000)
    tensor = torch.zeros(1 << 20, device="cuda")
    indices = []
    for _ in range(1000):
        indices.append(stash.park(tensor))
        tensor = tensor + 1
    assert torch.cuda.max_memory_allocated() <= before + (LAG + 2) * size
    for index in reversed(indices):
        assert (stash.fetch(index, torch.device("cuda")) == index).all()


@needs_gpu
@pytest.mark.gpu
def test_an_abandoned_pass_harms_nobody() -> None:
    from pronghorn.memory import HostStash

    for _ in range(20):
        stash = HostStash(torch.cuda.Stream())
        indices = [stash.park(torch.full((1 << 20,), 7.0, device="cuda")) for _ in range(4)]
        stash.fetch(indices[-1], torch.device("cuda"))
        stash.fetch(indices[-2], torch.device("cuda"))  # starts bringing back the next
        del stash
        fresh = torch.zeros(1 << 20, device="cuda")
        assert (fresh == 0).all()


def test_without_a_gpu_offload_is_none() -> None:
    model = add_adapter(tiny_model("llama"))
    batch = rows_batch(model.config.vocab_size, (9, 4))
    assert_same(run(bound_copy(model, "offload"), batch), run(bound_copy(model, "none"), batch), 0.0)
