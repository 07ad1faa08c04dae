"""Launch parameters shared by the row-wise kernels."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor
from triton.language.extra import cuda


def row_block(width: int) -> tuple[int, int]:
    """(block, warps) for a program that holds a whole row of `width` elements in registers."""
    block = triton.next_power_of_2(width)
    # 8 to 16 elements a thread: below, threads idle; above, fp32 copies of several rows spill at 64k.
    return block, min(max(block // 512, 1), 16)


@cache
def processors(index: int) -> int:
    """Streaming multiprocessors of a GPU; for the interpreter, a small number that makes programs loop."""
    return torch.cuda.get_device_properties(index).multi_processor_count if index >= 0 else 2


def processors_of(device: torch.device) -> int:
    return processors((device.index or 0) if device.type == "cuda" else -1)


def programs(rows: int, device: torch.device, per_processor: int) -> int:
    """Programs of a kernel that loops over rows: enough to fill the GPU, no more than there are rows."""
    return max(1, min(rows, processors_of(device) * per_processor))


def unit_rows(x: Tensor) -> Tensor:
    """x with unit stride along the row; copied only where it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def launch_next():
    """Let the next kernel's programs begin as soon as all of this one's have (they wait before they read)."""
    cuda.gdc_launch_dependents()


@triton.jit
def wait_for_last():
    """Wait until the kernel before has ended and all that it wrote can be read."""
    cuda.gdc_wait()


def has_warpgroups(device: torch.device) -> bool:
    """Whether four warps multiply as one, with their left side in registers."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


#: up to so many rows are a decoding step's, whose launches last no longer than the gaps between them
FEW_ROWS = 256


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """The launch argument under which `wait_for_last` means something, where the GPU knows it; else nothing."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {}
    return {"launch_pdl": True}
