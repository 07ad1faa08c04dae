"""Which implementation runs, and why."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from pronghorn.errors import AttentionUnavailable, nearest

#: What each implementation is.
BACKENDS = {
    "cudnn": "cuDNN over the ragged stream",
    "flash": "torch's FlashAttention-2 over the packed stream",
    "flex": "torch's FlexAttention, compiled for this mask",
    "cpu": "tiles of queries, equally long neighbouring documents together",
    "sdpa": "torch's scaled_dot_product_attention, document by document",
    "eager": "the formula written out, document by document",
}


@dataclass(frozen=True)
class Wishes:
    """What a model asks for besides causal attention inside documents."""

    window: bool
    softcap: bool
    sinks: bool
    both_ways: bool

    @property
    def beyond_packed(self) -> str | None:
        """What packed kernels cannot do; sinks are put on top of any kernel's statistics."""
        return "softcap" if self.softcap else "tokens that see what follows them" if self.both_ways else None


@lru_cache(maxsize=256)
def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    window: bool = False,
    softcap: bool = False,
    sinks: bool = False,
    both_ways: bool = False,
    wanted: str | None = None,
) -> tuple[str, str]:
    """The fastest implementation for a device, dtype, head size and kind of attention, and the reason.

    Args:
        window, softcap, sinks, both_ways: what the model asks for besides causal attention inside documents
            (`both_ways`: `Documents.seen_to`).
        wanted: a name of `BACKENDS` to use, whatever is fastest.

    Raises:
        AttentionUnavailable: `wanted` is no implementation, or not one for this case.
    """
    wishes = Wishes(window, softcap, sinks, both_ways)
    if wanted is not None:
        return _checked(wanted, device, dtype, head_dim, wishes)
    refusal = None
    for name in _by_speed(device, wishes):
        reason = _refusal(name, device, dtype, head_dim, wishes)
        if reason is None:
            return name, BACKENDS[name] + (f"; {refusal}" if refusal else "")
        refusal = reason
    raise AssertionError("the written-out formula takes everything")


def check_name(wanted: str | None) -> None:
    """Refuse a name that is none of `BACKENDS`; None is no wish.

    Raises:
        AttentionUnavailable: for such a name.
    """
    if wanted is not None and wanted not in BACKENDS:
        raise AttentionUnavailable(
            f"there is no attention named {wanted!r}",
            fix=nearest(str(wanted), BACKENDS) or f"one of {', '.join(BACKENDS)}",
        )


def _checked(
    wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int, wishes: Wishes
) -> tuple[str, str]:
    check_name(wanted)
    refusal = _refusal(wanted, device, dtype, head_dim, wishes)
    if refusal is not None:
        raise AttentionUnavailable(
            f"attention '{wanted}' was asked for, but {refusal}",
            fix=f"'{choose_backend(device, dtype, head_dim, **vars(wishes))[0]}', or leave the choice open",
        )
    return wanted, f"{BACKENDS[wanted]}, as asked for"


def _by_speed(device: torch.device, wishes: Wishes) -> tuple[str, ...]:
    if device.type == "cuda":
        return ("cudnn", "flash", *(("flex",) if wishes.beyond_packed else ()), "sdpa", "eager")
    return ("cpu", "sdpa", "eager") if device.type == "cpu" else ("sdpa", "eager")


def _refusal(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, wishes: Wishes
) -> str | None:
    """Why an implementation cannot do this case; None when it can."""
    if name in ("cudnn", "flash", "flex") and device.type != "cuda":
        return f"it runs on CUDA GPUs, not on {device.type}"
    if name in ("cudnn", "flash") and wishes.beyond_packed is not None:
        return f"packed kernels know no {wishes.beyond_packed}"
    if name == "cudnn":
        from pronghorn.kernels.attention.cudnn_ragged import why_not

        return why_not(device, dtype, head_dim, windowed=wishes.window)
    if name == "flash" and dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention-2 takes fp16 and bf16, not {dtype}"
    if name == "flash" and (head_dim > 256 or head_dim % 8):
        return f"FlashAttention-2 takes head sizes up to 256 in steps of 8, not {head_dim}"
    if name in ("flash", "flex"):
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            which = "FlashAttention-2" if name == "flash" else "FlexAttention"
            return f"{which} needs compute capability 8.0, this is {capability[0]}.{capability[1]}"
    if name == "cpu" and device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    if name == "sdpa" and wishes.softcap:
        return "scaled_dot_product_attention knows no softcap"
    if name == "sdpa" and wishes.sinks:
        return "scaled_dot_product_attention gives no statistics to add sinks to"
    return None
