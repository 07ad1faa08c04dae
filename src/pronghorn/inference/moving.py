"""Numbers between host and device, without either waiting for the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def on_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host on a device; a later step on the current stream finds them there."""
    found = torch.as_tensor(values, dtype=dtype)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


def to_host(values: Tensor) -> Tensor:
    """A copy on the host, there once the current stream has come so far."""
    if not values.is_cuda:
        return values.clone()
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
