"""What this machine can do. Every fact comes with the reason it was concluded from."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class Fact:
    """A value and why it holds, for printing: ``bfloat16 (compute capability 9.0)``."""

    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})"


@dataclass(frozen=True)
class Hardware:
    """The machine as `probe` found it.

    `compute_dtype.value` is a torch dtype name. Memory is in bytes. `capability` is (0, 0) without a CUDA GPU.
    `fp8.value` is how e4m3 matrices are multiplied: "rows" (a scale for each row), "tensors" (one for each matrix),
    "emulated", or None for not at all. `int8.value` is "units", "emulated" or None.
    """

    device: str
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    compute_dtype: Fact
    triton: Fact
    cpu_cores: int
    fp8: Fact = Fact(None, "nobody looked")
    int8: Fact = Fact(None, "nobody looked")

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class GpuMemory:
    """A GPU's memory in bytes.

    Args:
        total: all of it. free: what nobody has. reserved: what torch has in this process, used or not.
        allowed: what torch may have in this process (`torch.cuda.set_per_process_memory_fraction`); None: everything.
    """

    total: int
    free: int
    reserved: int
    allowed: int | None = None

    @property
    def others(self) -> int:
        """What neither is free nor this process's."""
        return max(self.total - self.free - self.reserved, 0)

    @property
    def within_reach(self) -> int:
        """What torch can have in this process at most."""
        reach = self.free + self.reserved
        return reach if self.allowed is None else min(reach, self.allowed)


def gpu_memory(device: Any = None) -> GpuMemory:
    """Of a CUDA device; None is the current one."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return GpuMemory(
        total, free, torch.cuda.memory_reserved(device), int(share * total) if share < 1 else None
    )


@lru_cache(maxsize=1)
def probe() -> Hardware:
    """Look at the machine once per process. Imports torch; initialises CUDA when there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        return _cpu_hardware()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = (properties.major, properties.minor)
    shown = f"compute capability {capability[0]}.{capability[1]}"
    if capability >= (8, 0):
        dtype = Fact("bfloat16", f"{shown} multiplies bf16 matrices")
    else:
        dtype = Fact("float16", f"{shown} has no bf16 matrix units")
    return Hardware(
        device="cuda",
        name=properties.name,
        capability=capability,
        memory_bytes=properties.total_memory,
        compute_dtype=dtype,
        triton=_triton_fact(shown, capability),
        cpu_cores=os.cpu_count() or 1,
        fp8=_fp8_fact(shown, capability),
        int8=_int8_fact(shown, capability),
    )


def _int8_fact(shown: str, capability: tuple[int, int]) -> Fact:
    if capability < (7, 5):
        return Fact(
            None,
            f"int8 matrices are multiplied from compute capability 7.5 on; this is {capability[0]}.{capability[1]}",
        )
    return Fact("units", f"{shown} multiplies int8 matrices")


def _fp8_fact(shown: str, capability: tuple[int, int]) -> Fact:
    if capability < (8, 9):
        return Fact(
            None,
            f"e4m3 matrices are multiplied from compute capability 8.9 on; this is {capability[0]}.{capability[1]}",
        )
    # Consumer Blackwell (12.x) refuses row scales as Ada does.
    if capability[0] in (9, 10):
        return Fact("rows", f"{shown} multiplies e4m3 matrices with a scale for each row")
    return Fact("tensors", f"{shown} multiplies e4m3 matrices with one scale for each")


def _triton_fact(shown: str, capability: tuple[int, int]) -> Fact:
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return Fact(False, "the triton package is not installed")
    if capability < (7, 0):
        return Fact(False, f"Triton needs compute capability 7.0; {shown}")
    return Fact(True, shown)


def _cpu_hardware() -> Hardware:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return Hardware(
        device="cpu",
        name=_cpu_name(),
        capability=(0, 0),
        memory_bytes=memory,
        compute_dtype=_cpu_dtype(torch),
        triton=Fact(False, "no CUDA GPU: the torch path of every kernel is used"),
        cpu_cores=os.cpu_count() or 1,
        fp8=Fact("emulated", "no GPU: values are rounded to e4m3 and multiplied in fp32, which is slow"),
        int8=Fact("emulated", "no GPU: values are rounded to 8 bits and multiplied in fp64, which is slow"),
    )


def _cpu_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return next((name for name in names if name), platform.processor() or platform.machine())


def _cpu_dtype(torch: Any) -> Fact:
    # A CPU without bf16 dot products emulates them: several times slower than fp32 there.
    if getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return Fact("bfloat16", "the CPU has AVX512-BF16 dot products")
    return Fact("float32", "no GPU, and the CPU has no bf16 dot products")
