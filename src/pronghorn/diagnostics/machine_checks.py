"""What surrounds the GPU: disk, memory, and the links between them, measured."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pronghorn.diagnostics.checks import NotHere, Unsound

#: An 8B model in 16 bits is 16 GB; a 4-bit one 6.
LEAST_DISK, LEAST_MEMORY = 2 * 2**30, 2 * 2**30
_WRITTEN = 128 * 2**20
_COPIED = 256 * 2**20
_PIECES = 8
_NO_GPU = "no CUDA GPU"


def cache_folder() -> Path:
    """Where the hub's client keeps models; the nearest folder above it that exists already."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def disk() -> str:
    """Room and write speed (synced) where models are kept."""
    folder = cache_folder()
    free = shutil.disk_usage(folder).free
    if free < LEAST_DISK:
        raise Unsound(
            f"{free / 2**30:.1f} GiB are free in {folder}, where models are kept",
            "free some, or point HF_HOME to another disk",
        )
    block = os.urandom(2**20) * 8
    began = time.perf_counter()
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".pronghorn-doctor-") as file:
            written = 0
            while written < _WRITTEN and time.perf_counter() - began < 5:
                written += file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - began
    except OSError as error:
        raise Unsound(
            f"{folder}, where models are kept, cannot be written: {error.strerror}",
            "give yourself the right to write there, or point HF_HOME to another folder",
        ) from error
    speed = written / seconds / 1e6
    return f"{free / 2**30:.0f} GiB free in {folder}, {speed:.0f} MB/s written"


def host_memory() -> str:
    """Memory that is left, of the machine or of the container, whichever is less."""
    from pronghorn.memory import host_memory as look

    found = look()
    if not found.total:
        raise NotHere("this system does not tell")
    where = "of this container" if found.contained else "of the machine"
    left = f"{found.available / 2**30:.1f} GiB of {found.total / 2**30:.1f} GiB {where} are available"
    if found.available < LEAST_MEMORY:
        raise Unsound(left, "end other programs; loading a model needs room for one of its files")
    return left


def pinned_memory() -> str:
    """Host memory that the GPU reads and writes by itself, which offloaded layers and batches wait in."""
    import torch

    from pronghorn.memory import pinned

    if not torch.cuda.is_available():
        raise NotHere(_NO_GPU)
    began = time.perf_counter()
    try:
        held = pinned([_COPIED // _PIECES] * _PIECES)
    except RuntimeError as error:
        raise Unsound(
            f"{_COPIED >> 20} MiB cannot be pinned: {str(error).splitlines()[0]}",
            "raise the limit of locked memory (`ulimit -l unlimited`; docker: --ulimit memlock=-1)",
        ) from error
    seconds = time.perf_counter() - began
    return f"{sum(map(len, held)) >> 20} MiB pinned in {seconds * 1e3:.0f} ms"


def _gigabytes_a_second(copy: Callable[[], object], size: int) -> float:
    """The faster of three copies."""
    import torch

    best = float("inf")
    for _ in range(4):  # the first one sets things up
        torch.cuda.synchronize()
        began = time.perf_counter()
        copy()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return size / best / 1e9


def host_link() -> str:
    """Copies of pinned memory to the GPU and back."""
    import torch

    if not torch.cuda.is_available():
        raise NotHere(_NO_GPU)
    host = torch.zeros(_COPIED, dtype=torch.uint8).pin_memory()
    device = torch.empty(_COPIED, dtype=torch.uint8, device="cuda")
    to_gpu = _gigabytes_a_second(lambda: device.copy_(host, non_blocking=True), _COPIED)
    back = _gigabytes_a_second(lambda: host.copy_(device, non_blocking=True), _COPIED)
    said = f"{to_gpu:.1f} GB/s to the GPU, {back:.1f} GB/s back (pinned)"
    if min(to_gpu, back) < 1.0:
        raise Unsound(
            said,
            "the slot or riser gives the GPU few PCIe lanes (`nvidia-smi -q -d PCIE`), or another job uses the link",
        )
    return said


def peer_link() -> str:
    """Copies between the first GPU and each other one, and that what arrives is what was sent."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        raise NotHere("there is one GPU" if count else _NO_GPU)
    source = torch.arange(_COPIED // 4, dtype=torch.int32, device="cuda:0")
    said = []
    for index in range(1, min(count, 8)):
        target = torch.empty_like(source, device=f"cuda:{index}")
        target.copy_(source)
        if not torch.equal(target.to("cuda:0"), source):
            raise Unsound(
                f"what GPU {index} got from GPU 0 is not what was sent",
                "switch peer access off (NCCL_P2P_DISABLE=1), and the IOMMU in the BIOS",
            )

        def copy(target: torch.Tensor = target, index: int = index) -> None:
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize(index)

        direct = "direct" if torch.cuda.can_device_access_peer(0, index) else "through the host"
        said.append(f"0→{index} {_gigabytes_a_second(copy, _COPIED):.0f} GB/s ({direct})")
    return ", ".join(said)
