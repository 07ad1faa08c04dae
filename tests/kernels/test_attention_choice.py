"""Which implementation is chosen, and that it says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from pronghorn.errors import AttentionUnavailable
from pronghorn.kernels.attention import INSTALL_CUDNN, choose_backend, cudnn_ragged

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Pretend to be a machine: a GPU's capability, and the versions of the frontend and of cuDNN (None: missing)."""

    def pretend(capability: tuple[int, int], version: str | None = "1.18.0", cudnn: int = 91900) -> None:
        def frontend() -> SimpleNamespace:
            if version is None:
                raise ImportError("No module named 'cudnn'")
            return SimpleNamespace(__version__=version, backend_version=lambda: cudnn)

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(cudnn_ragged, "frontend", frontend)
        monkeypatch.setattr(cudnn_ragged, "_probe", lambda device, dtype, size, window: f"probed at {size}")
        forget()

    def forget() -> None:
        choose_backend.cache_clear()
        cudnn_ragged._why_no_frontend.cache_clear()

    yield pretend
    forget()


def test_hopper_takes_cudnn(machine: Machine) -> None:
    machine((9, 0))
    for size in (64, 80, 96, 128):
        backend, reason = choose_backend(CUDA, torch.bfloat16, size, window=True)
        assert backend == "cudnn" and reason


@pytest.mark.parametrize("version, cudnn", [("1.24.0", 91900), ("1.17.0", 91900), ("1.18.0", 91500)])
def test_other_versions_are_probed(version: str, cudnn: int, machine: Machine) -> None:
    machine((9, 0), version, cudnn)
    backend, reason = choose_backend(CUDA, torch.bfloat16, 128)
    assert backend == "flash"
    assert "probed at 128" in reason


def test_large_heads_and_newer_gpus_are_probed(machine: Machine) -> None:
    machine((9, 0))
    assert "probed at 256" in choose_backend(CUDA, torch.bfloat16, 256)[1]
    machine((10, 0))
    assert "probed at 128" in choose_backend(CUDA, torch.bfloat16, 128)[1]


def test_missing_package_is_named(machine: Machine) -> None:
    machine((9, 0), None)
    backend, reason = choose_backend(CUDA, torch.bfloat16, 128)
    assert backend == "flash"
    assert INSTALL_CUDNN in reason


def test_older_gpus(machine: Machine) -> None:
    machine((8, 9))
    assert choose_backend(CUDA, torch.bfloat16, 128)[0] == "flash"
    machine((7, 5))
    backend, reason = choose_backend(CUDA, torch.float16, 128)
    assert backend == "sdpa"
    assert "7.5" in reason
    assert choose_backend(CUDA, torch.float16, 128, softcap=True)[0] == "eager"


@pytest.mark.parametrize("head_dim", [100, 260])
def test_head_sizes_that_packed_kernels_do_not_take(head_dim: int, machine: Machine) -> None:
    machine((9, 0))
    backend, reason = choose_backend(CUDA, torch.bfloat16, head_dim)
    assert backend == "sdpa"
    assert str(head_dim) in reason


def test_head_size_of_eights_goes_to_flash(machine: Machine) -> None:
    machine((9, 0))
    assert choose_backend(CUDA, torch.bfloat16, 72)[0] == "flash"


def test_masks_beyond_packed_kernels(machine: Machine) -> None:
    machine((9, 0))
    assert choose_backend(CUDA, torch.bfloat16, 128, softcap=True)[0] == "flex"
    assert choose_backend(CUDA, torch.bfloat16, 128, both_ways=True)[0] == "flex"
    assert choose_backend(CUDA, torch.bfloat16, 128, sinks=True)[0] == "cudnn"
    assert choose_backend(CUDA, torch.float32, 128)[0] == "sdpa"
    assert choose_backend(CUDA, torch.float32, 128, sinks=True)[0] == "eager"


def test_cpu() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        backend, reason = choose_backend(CPU, dtype, 64)
        assert backend == "cpu" and reason
    assert choose_backend(CPU, torch.float32, 64, sinks=True, both_ways=True, softcap=True)[0] == "cpu"
    with pytest.raises(AttentionUnavailable, match="softcap"):
        choose_backend(CPU, torch.float32, 64, softcap=True, wanted="sdpa")


def test_explicit_choice(machine: Machine) -> None:
    machine((9, 0))
    assert choose_backend(CUDA, torch.bfloat16, 128, wanted="flash")[0] == "flash"
    assert choose_backend(CPU, torch.float32, 64, wanted="sdpa")[0] == "sdpa"
    with pytest.raises(AttentionUnavailable, match=r"asked for, but it runs on CUDA GPUs.*'cpu'"):
        choose_backend(CPU, torch.float32, 64, wanted="flash")
    with pytest.raises(AttentionUnavailable, match=r"flash3.*did you mean 'flash'"):
        choose_backend(CUDA, torch.bfloat16, 128, wanted="flash3")
