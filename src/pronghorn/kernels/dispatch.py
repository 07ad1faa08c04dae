"""Which implementation of a kernel runs."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

logger = logging.getLogger("pronghorn")

Impl = Literal["triton", "torch"]


@cache
def triton_reason() -> str | None:
    """Why Triton kernels cannot run on this machine's GPUs, or None when they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.cuda.is_available() and torch.version.cuda and torch.cuda.get_device_capability() < (7, 0):
        return "Triton needs compute capability 7.0 or newer"
    return None


@cache
def _tell_once(reason: str) -> None:
    logger.warning("kernels run as plain torch, slower and with more memory: %s", reason)


def use_triton(tensor: Tensor, impl: Impl | None) -> bool:
    """Whether a call on `tensor` runs the Triton kernel; fp64 always takes the reference unless asked otherwise."""
    if impl is not None:
        return impl == "triton"
    if not tensor.is_cuda or tensor.dtype == torch.float64:
        return False
    reason = triton_reason()
    if reason is not None:
        _tell_once(reason)
    return reason is None


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype arithmetic runs in: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
