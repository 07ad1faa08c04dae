"""The host's memory: how much there is, and pinned pieces of it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: threads that ask for pages: one thread pins 2.7 to 4.3 GiB a second, eight 17 (16 cores beside an H200)
_THREADS = 8
_PAGE = 4096


@dataclass(frozen=True)
class HostMemory:
    """Bytes, of the machine or, where `contained`, of the control group that this process is limited by; 0 where the
    system does not tell."""

    total: int
    available: int
    contained: bool = False


def host_memory() -> HostMemory:
    """What the kernel says of the machine, or of the control group where that leaves less."""
    machine = _of_machine()
    limit, used = _of_group()
    if limit is None or limit >= machine.total > 0:
        return machine
    return HostMemory(limit, min(machine.available, max(limit - used, 0)), contained=True)


def available_host_bytes() -> int:
    """Host memory that can be taken now: what the kernel calls available, within the control group's limit."""
    return host_memory().available


def _of_machine() -> HostMemory:
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="ascii").splitlines() if meminfo.is_file() else []
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    if "MemAvailable" in sizes:
        return HostMemory(sizes["MemTotal"], sizes["MemAvailable"])
    names, asked = os.sysconf_names if hasattr(os, "sysconf") else {}, ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")
    # macOS tells the first alone, of which nothing would seem left.
    if not all(name in names for name in asked):
        return HostMemory(0, 0)
    total, available = (os.sysconf("SC_PAGE_SIZE") * os.sysconf(name) for name in asked)
    return HostMemory(total, available)


def _of_group() -> tuple[int | None, int]:
    """(limit, used without what the page cache would give back) of the control group."""
    root = Path("/sys/fs/cgroup")
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = (root / limit_name).read_text().strip(), (root / used_name).read_text().strip()
        except OSError:  # no such group
            continue
        if not limit.isdigit():  # "max": no limit of its own
            return None, 0
        try:
            stat = (root / limit_name).with_name("memory.stat").read_text().splitlines()
        except OSError:  # sandboxes that tell the limit need not tell what is cached
            stat = []
        cached = sum(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
        return int(limit), max(int(used) - cached, 0)
    return None, 0


def pinned(sizes: Sequence[int]) -> list[Tensor]:
    """Pinned memory for the current GPU, uint8, its pages asked for by several threads at a time.

    Raises:
        RuntimeError: the system refuses to pin so much.
    """
    device = torch.cuda.current_device()

    def pin(size: int) -> Tensor:
        with torch.cuda.device(device):
            found = _registered(size)
            # torch knows other ways, and says why there is none.
            return torch.empty(size, dtype=torch.uint8, pin_memory=True) if found is None else found

    with ThreadPoolExecutor(min(_THREADS, max(len(sizes), 1)), thread_name_prefix="pronghorn-pin") as threads:
        return list(threads.map(pin, sizes))


def _registered(size: int) -> Tensor | None:
    try:
        region = _Pinned(-1, size)
    except OSError:
        return None
    found = torch.frombuffer(region, dtype=torch.uint8)
    found[::_PAGE].zero_()
    return found if region.pin(found.data_ptr()) else None


class _Pinned(mmap.mmap):
    """Memory of its own that is shared with forked processes: no copy of a page is made while a GPU writes to it."""

    _address: int | None = None
    _unpin: Any = None

    def pin(self, address: int) -> bool:
        runtime = torch.cuda.cudart()
        # 1: for the contexts of all GPUs.
        if int(runtime.cudaHostRegister(address, len(self), 1)) != 0:
            return False
        self._address, self._unpin = address, runtime.cudaHostUnregister
        return True

    def __del__(self) -> None:
        # Before the pages go back: this runs ahead of the base class's own end.
        if self._address is not None:
            self._unpin(self._address)
