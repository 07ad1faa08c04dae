"""Which implementation runs, and why."""

from __future__ import annotations

import torch


def choose_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """The implementation for a device, dtype and head size, and the reason.

    "flash": torch's FlashAttention-2 over `cu_seqlens`; "cpu": torch's CPU flash kernel, document by document;
    "sdpa": torch's scaled_dot_product_attention, document by document, recomputed in backward.
    """
    if device.type == "cpu":
        return "cpu", "torch's CPU flash kernel, one call for each run of equally long documents"
    if device.type != "cuda":
        return "sdpa", f"no packed attention for device type {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return "sdpa", f"FlashAttention-2 takes fp16 and bf16, not {dtype}"
    if head_dim > 256 or head_dim % 8:
        return "sdpa", f"FlashAttention-2 takes head sizes up to 256 in steps of 8, not {head_dim}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return (
            "sdpa",
            f"FlashAttention-2 needs compute capability 8.0, this is {capability[0]}.{capability[1]}",
        )
    return "flash", "torch's FlashAttention-2 over the packed stream"
