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
