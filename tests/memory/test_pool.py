"""The pinned pool is a stack over chunks: same shapes, same bytes; limits are told, not crossed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn.memory import HostMemory, HostPool, available_host_bytes, host, host_memory, pinned
from pronghorn.memory.offload import _matching, _stride
from pronghorn.memory.pool import LARGEST_CHUNK, SMALLEST_CHUNK


def unpinned(sizes: Sequence[int]) -> list[torch.Tensor]:
    return [torch.empty(size, dtype=torch.uint8) for size in sizes]


def pool(limit: int = 2**32) -> HostPool:
    return HostPool(limit, allocate=unpinned)


def addresses(taken: tuple[int, list[torch.Tensor]] | str) -> list[tuple[int, int]]:
    assert not isinstance(taken, str), taken
    return [(piece.data_ptr(), piece.numel()) for piece in taken[1]]


def test_a_pass_of_the_same_shapes_gets_the_same_bytes() -> None:
    host = pool()
    sizes = [3_000_000, 20_000_000, 5, 17_000_000]
    seen = []
    for _ in range(3):
        taken = [host.take(size) for size in sizes]
        seen.append([addresses(item) for item in taken])
        for start, _ in reversed(taken):
            host.give_back(start)
        assert host.used_bytes == 0
    assert seen[0] == seen[1] == seen[2]
    pinned = host.pinned_bytes
    host.take(sum(sizes) // 2)
    assert host.pinned_bytes == pinned, "a smaller pass pins nothing new"


def test_pieces_hold_the_size_and_never_overlap() -> None:
    host = pool()
    host.take(SMALLEST_CHUNK - 1000)
    pieces = addresses(host.take(3 * SMALLEST_CHUNK))
    assert sum(size for _, size in pieces) == 3 * SMALLEST_CHUNK and len(pieces) > 1
    following = addresses(host.take(100))
    spans = sorted(pieces + following)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(spans))


def test_bytes_below_live_ones_wait() -> None:
    """Two passes at once, the older one finished first."""
    host = pool()
    (low, _), (high, _) = host.take(1000), host.take(1000)
    host.give_back(low)
    assert host.used_bytes == 2024 - 1000 + 1000
    host.give_back(high)
    assert host.used_bytes == 0


def test_chunks_grow_up_to_a_size() -> None:
    asked: list[Sequence[int]] = []

    def allocate(sizes: Sequence[int]) -> list[torch.Tensor]:
        asked.append(sizes)
        return unpinned(sizes)

    host = HostPool(2**34, allocate)
    host.reserve(SMALLEST_CHUNK + 1)
    host.reserve(3 * LARGEST_CHUNK + 100 * 2**20)
    assert asked[0] == [2 * SMALLEST_CHUNK]
    assert asked[1] == 3 * [LARGEST_CHUNK] + [128 * 2**20], "all that is missing is asked for at once"
    assert host.pinned_bytes == sum(map(sum, asked))


def test_the_limit_is_named() -> None:
    host = pool(limit=64 * 2**20)
    assert host.reserve(32 * 2**20) is None
    refused = host.take(2**30)
    assert isinstance(refused, str) and "1.0 GiB" in refused and "0.1 GiB" in refused
    assert host.used_bytes == 0
    assert not isinstance(host.take(1000), str), "what fits is still given"


def test_a_system_that_refuses_to_pin_is_no_crash() -> None:
    def refuse(sizes: Sequence[int]) -> list[torch.Tensor]:
        raise RuntimeError("CUDA error: out of memory\nmore")

    refused = HostPool(2**34, refuse).take(10)
    assert isinstance(refused, str) and refused.endswith("CUDA error: out of memory")


def test_tensors_match_pieces_across_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1000, 3000, generator=generator),
        torch.randn(7, generator=generator),
        torch.randn(1000, 1500, generator=generator).bfloat16(),
        torch.empty(0),
        torch.arange(2_000_001),
    ]
    host = pool()
    host.reserve(SMALLEST_CHUNK)
    _, pieces = host.take(sum(map(_stride, tensors)))
    assert len(pieces) > 1
    for there, here in _matching(pieces, tensors):
        assert here.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in tensors}
        there.copy_(here)
    back = [torch.empty_like(tensor) for tensor in tensors]
    for there, here in _matching(pieces, back):
        here.copy_(there)
    assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))


def test_available_memory_is_a_plausible_number() -> None:
    assert 2**20 < available_host_bytes() < 2**50


def test_a_group_leaves_what_its_page_cache_would_give_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {
        "memory.max": "1000",
        "memory.current": "900",
        "memory.stat": "anon 100\ninactive_file 300\nfile 700",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(host, "Path", lambda path: tmp_path if path == "/sys/fs/cgroup" else Path(path))
    found = host_memory()
    assert found == HostMemory(1000, 400, contained=True)
    (tmp_path / "memory.stat").unlink()
    assert host_memory() == HostMemory(1000, 100, contained=True), "a limit counts without it"
    (tmp_path / "memory.max").write_text("max")
    assert host_memory().total > 1000 and not host_memory().contained


def test_memory_that_cannot_be_registered_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def empty(size: int, **arguments: Any) -> torch.Tensor:
        asked.append(size)
        assert arguments["pin_memory"]
        return torch.zeros(size, dtype=torch.uint8)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(
        host, "_registered", lambda size: None if size == 8 else torch.zeros(size, dtype=torch.uint8)
    )
    monkeypatch.setattr(torch, "empty", empty)
    assert [len(found) for found in pinned([4, 8, 16])] == [4, 8, 16]
    assert asked == [8]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_pinned_memory_is_written_to_by_the_gpu() -> None:
    sizes = [5 * 2**20 + 3, 16 * 2**20, 100]
    expected = torch.arange(100, dtype=torch.uint8)
    for _ in range(3):
        found = pinned(sizes)
        assert [len(piece) for piece in found] == sizes and all(piece.is_pinned() for piece in found)
        found[2].copy_(expected.cuda(), non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(found[2], expected)
        mine = host._registered(2**20)
        assert mine is not None and mine.is_pinned(), "what went before has been given back"
        del found, mine
