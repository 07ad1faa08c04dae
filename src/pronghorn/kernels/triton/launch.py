"""Launch parameters shared by the row-wise kernels."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor


def row_block(width: int) -> tuple[int, int]:
    """(block, warps) for a program that holds a whole row of `width` elements in registers."""
    block = triton.next_power_of_2(width)
    # 8 to 16 elements a thread: below, threads idle; above, fp32 copies of several rows spill at 64k.
    return block, min(max(block // 512, 1), 16)


@cache
def processors(index: int) -> int:
    """Streaming multiprocessors of a GPU; for the interpreter, a small number that makes programs loop."""
    return torch.cuda.get_device_properties(index).multi_processor_count if index >= 0 else 2


def programs(rows: int, device: torch.device, per_processor: int) -> int:
    """Programs of a kernel that loops over rows: enough to fill the GPU, no more than there are rows."""
    index = (device.index or 0) if device.type == "cuda" else -1
    return max(1, min(rows, processors(index) * per_processor))


def unit_rows(x: Tensor) -> Tensor:
    """x with unit stride along the row; copied only where it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()
