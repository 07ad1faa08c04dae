"""Parked tensors come back unchanged, and the GPU holds less meanwhile."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import pytest
import torch

from pronghorn.memory import HostPool, HostStash, offload
from pronghorn.memory.offload import LAG
from tests.families.parity import add_adapter, assert_same, bound_copy, rows_batch, run
from tests.tiny import tiny_model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="parking needs a GPU to park from")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("depth", ["none", "attention", "matmuls"])
def test_offloaded_gradients_are_bitwise_those_on_the_device(depth: str) -> None:
    model = add_adapter(tiny_model("llama", num_hidden_layers=4)).cuda()
    batch = {k: v.cuda() for k, v in rows_batch(model.config.vocab_size, (64, 64, 64)).items()}
    parked = "offload" if depth == "none" else f"offload-{depth}"
    expected = run(bound_copy(model, depth), batch)
    for levels in (parked, [parked, depth, parked, "all"], [parked, "offload", parked, "offload"]):
        for _ in range(2):  # pinned memory is reused from the second pass on
            assert_same(run(bound_copy(model, levels), batch), expected, 0.0)


@needs_gpu
@pytest.mark.gpu
def test_parked_inputs_leave_the_gpu() -> None:
    stash = HostStash(torch.cuda.Stream())
    before, size = torch.cuda.memory_allocated(), 4 << 20
    copies, indices = [], []
    torch.cuda.reset_peak_memory_stats()
    for seed in range(8):
        generator = torch.Generator("cuda").manual_seed(seed)
        tensor = torch.randn(1 << 20, device="cuda", generator=generator)
        copies.append(tensor.cpu())
        indices.append(stash.park([tensor]))
        del tensor
    # Stream order, not luck: without any synchronisation never more than the ones on their way out and a new one.
    assert torch.cuda.max_memory_allocated() <= before + (LAG + 1) * size
    assert torch.cuda.memory_allocated() == before + LAG * size
    for index, expected in reversed(list(zip(indices, copies, strict=True))):
        assert torch.equal(stash.fetch(index, torch.device("cuda"))[0].cpu(), expected)
    assert torch.cuda.memory_allocated() == before


@needs_gpu
@pytest.mark.gpu
def test_host_ahead_of_the_gpu_holds_no_more() -> None:
    """A thousand layers are enqueued while the first copy has hardly begun."""
    stash, size = HostStash(torch.cuda.Stream()), 4 << 20
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda._sleep(200_000_000)
    tensor = torch.zeros(1 << 20, device="cuda")
    indices = []
    for _ in range(1000):
        indices.append(stash.park([tensor]))
        tensor = tensor + 1
    assert torch.cuda.max_memory_allocated() <= before + (LAG + 2) * size
    for index in reversed(indices):
        assert (stash.fetch(index, torch.device("cuda"))[0] == index).all()


@needs_gpu
@pytest.mark.gpu
def test_an_abandoned_pass_harms_nobody() -> None:
    for _ in range(20):
        stash = HostStash(torch.cuda.Stream())
        indices = [stash.park([torch.full((1 << 20,), 7.0, device="cuda")]) for _ in range(4)]
        stash.fetch(indices[-1], torch.device("cuda"))
        stash.fetch(indices[-2], torch.device("cuda"))  # starts bringing back the next
        del stash
        fresh = torch.zeros(1 << 20, device="cuda")
        assert (fresh == 0).all()


@needs_gpu
@pytest.mark.gpu
def test_a_captured_pass_replays_with_the_same_host_bytes() -> None:
    stream, pool = torch.cuda.Stream(), HostPool()
    source = torch.zeros(1 << 20, device="cuda")
    total = torch.zeros(1 << 20, device="cuda")

    def one_pass() -> None:
        stash = HostStash(stream, pool)
        indices = [stash.park([source + i, source * i]) for i in range(6)]
        for i, index in reversed(list(enumerate(indices))):
            plus, times = stash.fetch(index, torch.device("cuda"))
            total.add_(plus).add_(times, alpha=10**i)
        stash.join(source.device)

    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        one_pass()
    torch.cuda.current_stream().wait_stream(warm)
    pinned, graph = pool.pinned_bytes, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_pass()
    assert pool.pinned_bytes == pinned and pool.used_bytes == 0
    for value in (1.0, 2.0, 3.0):
        source.fill_(value)
        total.zero_()
        graph.replay()
        expected = sum(value + i + value * i * 10**i for i in range(6))
        assert torch.allclose(total, torch.full_like(total, expected))


@needs_gpu
@pytest.mark.gpu
def test_without_host_memory_tensors_stay_on_the_device() -> None:
    told: list[str] = []
    stash = HostStash(torch.cuda.Stream(), HostPool(limit=0), told.append)
    tensor = torch.arange(10.0, device="cuda")
    index = stash.park([tensor])
    assert stash.fetch(index, tensor.device)[0] is tensor
    assert len(told) == 1 and "pinned host memory" in told[0]


class FakeStream:
    """Work is done when it is given; what matters is who waits for whom."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append(f"{self.name} waits for copy {event.number}")


class FakeEvent:
    count = 0

    def record(self, stream: FakeStream) -> None:
        self.number = FakeEvent.count
        FakeEvent.count += 1


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    computing = FakeStream("computing", lines)
    FakeEvent.count = 0
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: computing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    return lines


def fake_stash(log: list[str], limit: int = 2**32) -> tuple[HostStash, HostPool]:
    pool = HostPool(limit, lambda sizes: [torch.empty(size, dtype=torch.uint8) for size in sizes])
    return HostStash(FakeStream("side", log), pool, log.append), pool  # type: ignore[arg-type]


def test_lists_come_back_in_the_opposite_order(log: list[str]) -> None:
    stash, pool = fake_stash(log)
    lists = [[torch.randn(4, 3), torch.randn(5).bfloat16(), torch.arange(7)] for _ in range(5)]
    indices = [stash.park(tensors) for tensors in lists]
    for index, expected in reversed(list(zip(indices, lists, strict=True))):
        back = stash.fetch(index, torch.device("cpu"))
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(back, expected, strict=True))
    assert pool.used_bytes == 0
    copies = {line.split()[-1] for line in log if line.startswith("computing waits for copy")}
    assert copies == {str(i) for i in range(FakeEvent.count)}, (
        "every copy is waited for: a capture ends joined"
    )


def test_views_of_one_storage_travel_together(log: list[str]) -> None:
    stash, pool = fake_stash(log)
    wide = torch.randn(50, 96)
    q, k = wide[:, :64].view(50, 4, 16), wide[:, 64:]
    corner = torch.randn(1000, 100)[:3, :5]
    index = stash.park([torch.randn(7), q, k, corner, torch.empty(0, 3)])
    assert pool.used_bytes < 50 * 96 * 4 + 4 * 512
    # More passes, so that the first has left.
    for _ in range(4):
        stash.park([torch.randn(7)])
    _, q_back, k_back, corner_back, empty = stash.fetch(index, torch.device("cpu"))
    assert torch.equal(q_back, q) and torch.equal(k_back, k) and q_back.stride() == q.stride()
    assert q_back.untyped_storage().data_ptr() == k_back.untyped_storage().data_ptr()
    assert torch.equal(corner_back, corner) and empty.shape == (0, 3)


def test_an_input_alone_lags_two_layers_and_a_list_one(log: list[str]) -> None:
    stash, _ = fake_stash(log)
    for _ in range(4):
        stash.park([torch.zeros(1000)])
    assert [line for line in log if "copy" in line] == [
        f"computing waits for copy {i}" for i in range(4 - LAG)
    ]
    log.clear()
    other, _ = fake_stash(log)
    FakeEvent.count = 0
    for _ in range(4):
        other.park([torch.zeros(1000), torch.zeros(2000)])
    assert [line for line in log if "copy" in line] == [f"computing waits for copy {i}" for i in range(3)]
    log.clear()
    mixed, _ = fake_stash(log)
    FakeEvent.count = 0
    for i in range(3):  # a list has the time of two layers where the next parks its input alone
        mixed.park([torch.zeros(1000), torch.zeros(2000)])
        mixed.park([torch.zeros(1000)])
        assert f"computing waits for copy {2 * i}" not in log


def test_a_large_input_leaves_alone_and_comes_back_when_asked_for(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "LARGE_INPUT", 4096)
    stash, _ = fake_stash(log)
    inputs = [torch.randn(1024) for _ in range(3)]
    indices = [stash.park([tensor]) for tensor in inputs]
    assert [line for line in log if "copy" in line] == [
        "computing waits for copy 0",
        "computing waits for copy 1",
    ]
    for index, expected in reversed(list(zip(indices, inputs, strict=True))):
        below = stash._parked[index - 1] if index else None
        assert torch.equal(stash.fetch(index, torch.device("cpu"))[0], expected)
        assert below is None or below.here is None
    log.clear()
    lists, _ = fake_stash(log)
    indices = [lists.park([torch.randn(1024), torch.randn(1024)]) for _ in range(3)]
    lists.fetch(indices[2], torch.device("cpu"))
    below = lists._parked[1]
    assert below is not None and below.here is not None, "long lists do not wait"


def test_no_room_on_the_host_is_told_and_harmless(log: list[str]) -> None:
    stash, pool = fake_stash(log, limit=16 * 2**20)
    small, large = torch.randn(10), torch.randn(8 * 2**20)
    indices = [stash.park([tensor]) for tensor in (small, large, small)]
    for index, expected in zip(reversed(indices), (small, large, small), strict=True):
        assert torch.equal(stash.fetch(index, torch.device("cpu"))[0], expected)
    assert any("stay" in line or "keep on the GPU" in line for line in log)
    assert pool.used_bytes == 0


def test_an_abandoned_pass_gives_its_host_memory_back(log: list[str]) -> None:
    stash, pool = fake_stash(log)
    for _ in range(3):
        stash.park([torch.zeros(1000)])
    assert pool.used_bytes > 0
    del stash
    gc.collect()
    assert pool.used_bytes == 0 and log[-1] == "computing waits for side"


def test_without_a_gpu_offload_is_none() -> None:
    model = add_adapter(tiny_model("llama"))
    batch = rows_batch(model.config.vocab_size, (9, 4))
    assert_same(run(bound_copy(model, "offload"), batch), run(bound_copy(model, "none"), batch), 0.0)


PARKED = ["offload", "offload-attention", "offload-matmuls"]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "levels", [*PARKED, ["offload", "offload-attention", "attention"], ["none", "offload-matmuls", "offload"]]
)
def test_layers_find_again_what_they_parked(
    family: str, levels: str | list[str], log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way through a model, with streams that do their work at once; parked bytes are overwritten after."""
    from pronghorn.engine.binding import Binding

    model = add_adapter(tiny_model(family, num_hidden_layers=3))
    batch = rows_batch(model.config.vocab_size, (9, 14, 3))
    expected = run(bound_copy(model, "all"), batch, logits=False)
    pools: list[HostPool] = []

    def new_stash(binding: Binding, device: torch.device) -> HostStash:
        stash, pool = fake_stash(log)
        pools.append(pool)
        return stash

    monkeypatch.setattr(Binding, "new_stash", new_stash)
    fast = bound_copy(model, levels)
    assert_same(run(fast, batch, logits=False), expected, 1e-6)
    assert pools[0].pinned_bytes > 0 and pools[0].used_bytes == 0


def test_an_evaluation_parks_nothing(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from pronghorn.engine.binding import Binding

    monkeypatch.setattr(Binding, "new_stash", lambda binding, device: fake_stash(log)[0])
    fast = bound_copy(add_adapter(tiny_model("llama")), "offload-attention")
    batch = rows_batch(fast.config.vocab_size, (9, 4))
    with torch.no_grad():
        fast(**batch, use_cache=False)
    assert log == []


def test_a_second_backward_is_refused_after_parking(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from pronghorn.engine.binding import Binding
    from pronghorn.errors import BackwardTwice

    monkeypatch.setattr(Binding, "new_stash", lambda binding, device: fake_stash(log)[0])
    fast = bound_copy(add_adapter(tiny_model("llama")), "offload-attention").train()
    loss = fast(**rows_batch(fast.config.vocab_size, (9, 4)), use_cache=False).loss
    loss.backward(retain_graph=True)
    with pytest.raises(BackwardTwice):
        loss.backward()
