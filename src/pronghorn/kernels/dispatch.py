"""Which implementation of a kernel runs."""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from pronghorn.hardware import probe

logger = logging.getLogger("pronghorn")

Impl = Literal["triton", "torch"]


@cache
def _tell_once(reason: str) -> None:
    logger.warning("kernels run as plain torch, slower and with more memory: %s", reason)


def use_triton(tensor: Tensor, impl: Impl | None) -> bool:
    """Whether a call on `tensor` runs the Triton kernel; fp64 always takes the reference unless asked otherwise."""
    if impl is not None:
        return impl == "triton"
    if not tensor.is_cuda or tensor.dtype == torch.float64:
        return False
    fact = probe().triton
    if not fact.value:
        _tell_once(fact.reason)
    return bool(fact.value)


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype arithmetic runs in: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


#: Elements of a block of rows whose wide temporaries stay in a CPU's caches: 512 KiB of fp32.
BLOCK_ELEMENTS = 1 << 17


def row_block(x: Tensor) -> int:
    """How many rows of x [T, width] the torch path of an elementwise kernel takes at a time.

    On a CPU temporaries as large as x leave the caches, and the allocator returns them to the system after each use:
    the page faults cost several times the arithmetic. Elsewhere all rows are taken at once.
    """
    rows = max(1, x.shape[0])
    return min(rows, max(1, BLOCK_ELEMENTS // max(1, x.shape[-1]))) if x.device.type == "cpu" else rows


def multiplies_in_triton(x: Tensor, impl: Impl | None) -> bool:
    """`use_triton` for kernels with products inside: Triton has those from Ampere on."""
    if impl is None and x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    return use_triton(x, impl)
