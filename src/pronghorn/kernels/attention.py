"""Causal attention over a packed token stream, one interface over several implementations.

    out[t, n] = Σ_j softmax_j(scale · q[t, n]·k[j, n//G]) v[j, n//G],   j in t's document, j ≤ t, t - j < window

Shapes: q [T, N, D], k and v [T, K, D] with G = N / K, out [T, N, D]; the statistics `lse` are fp32. Forward and
backward are explicit calls: the attention block decides what is kept between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Documents:
    """Where documents begin and end in a token stream.

    Args:
        cu_seqlens: int32 [documents + 1] offsets on the stream's device.
        max_seqlen: the longest document, in tokens.
        lengths: the same lengths on the host, where they are known without a device synchronisation.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    lengths: tuple[int, ...] | None = None

    def host_lengths(self) -> tuple[int, ...]:
        """Document lengths as Python integers; waits for the device when they are not known on the host."""
        if self.lengths is not None:
            return self.lengths
        return tuple(self.cu_seqlens.diff().tolist())


@dataclass(frozen=True)
class AttentionCall:
    """What one layer's attention needs besides its tensors: scale, window in tokens (None: all), implementation."""

    scale: float
    window: int | None
    backend: str


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


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """out [T, N, D] and the statistics that `attention_backward` wants ([N, T] or a flat vector, fp32)."""
    if call.backend == "flash":
        return _flash_forward(q, k, v, docs, call)
    if call.backend == "cpu":
        return _cpu_forward(q, k, v, docs, call)
    return _sdpa_forward(q, k, v, docs, call), q.new_empty(0, dtype=torch.float32)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    docs: Documents,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for dout [T, N, D]; `out` and `lse` as `attention_forward` returned them."""
    if call.backend == "flash":
        return _flash_backward(dout, q, k, v, out, lse, docs, call)
    if call.backend == "cpu":
        return _cpu_backward(dout, q, k, v, out, lse, docs, call)
    return _sdpa_backward(dout, q, k, v, docs, call)


def _flash_window(call: AttentionCall) -> dict[str, int]:
    # FlashAttention counts the keys left of the query, without the query itself.
    return {} if call.window is None else {"window_size_left": call.window - 1, "window_size_right": 0}


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    cu, longest = docs.cu_seqlens, docs.max_seqlen
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, cu, cu, longest, longest, 0.0, True, False, scale=call.scale, **_flash_window(call)
    )
    return out, lse


def _flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    docs: Documents,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    cu, longest = docs.cu_seqlens, docs.max_seqlen
    # The random state is read only for dropout > 0, which no supported family trains with.
    no_rng = torch.empty(2, dtype=torch.uint64, device=q.device)
    grads = aten._flash_attention_backward(
        dout, q, k, v, out, lse, cu, cu, longest, longest, 0.0, True, no_rng, no_rng[:0],
        scale=call.scale, **_flash_window(call),
    )  # fmt: skip
    return grads[0], grads[1], grads[2]


@dataclass(frozen=True)
class _Run:
    """`count` neighbouring documents of equal `length`, from token `start`."""

    start: int
    count: int
    length: int

    def batch(self, x: Tensor) -> Tensor:
        """[T, N, D] -> [count, N, length, D] view."""
        rows = x[self.start : self.start + self.count * self.length]
        return rows.view(self.count, self.length, *x.shape[1:]).transpose(1, 2)

    def statistics(self, flat: Tensor, heads: int) -> Tensor:
        part = flat[self.start * heads : (self.start + self.count * self.length) * heads]
        return part.view(self.count, heads, self.length)


def _runs(docs: Documents) -> Iterator[_Run]:
    start = 0
    for length, group in groupby(docs.host_lengths()):
        count = len(list(group))
        if length > 0:
            yield _Run(start, count, length)
        start += count * length


def _window_mask(run: _Run, call: AttentionCall, like: Tensor) -> Tensor | None:
    """Additive [length, length] mask of a sliding window that bites, else None (plain causal)."""
    if call.window is None or call.window >= run.length:
        return None
    position = torch.arange(run.length, device=like.device)
    distance = position[:, None] - position[None, :]
    allowed = (distance >= 0) & (distance < call.window)
    return torch.zeros(run.length, run.length, dtype=like.dtype, device=like.device).masked_fill_(
        ~allowed, float("-inf")
    )


def _expand_heads(x: Tensor, heads: int) -> Tensor:
    """[B, K, S, D] -> [B, N, S, D], each key-value head repeated for its group of query heads."""
    group = heads // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _sum_heads(grad: Tensor, kv_heads: int) -> Tensor:
    """The gradient of `_expand_heads`."""
    if grad.shape[1] == kv_heads:
        return grad
    return grad.unflatten(1, (kv_heads, -1)).sum(2)


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    out = torch.empty_like(q)
    statistics = q.new_empty(q.shape[0] * heads, dtype=torch.promote_types(q.dtype, torch.float32))
    for run in _runs(docs):
        mask = _window_mask(run, call, q)
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            run.batch(q),
            _expand_heads(run.batch(k), heads),
            _expand_heads(run.batch(v), heads),
            0.0,
            mask is None,
            attn_mask=mask,
            scale=call.scale,
        )
        run.batch(out).copy_(o)
        run.statistics(statistics, heads).copy_(lse)
    return out, statistics


def _cpu_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    docs: Documents,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads = q.shape[1], k.shape[1]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for run in _runs(docs):
        mask = _window_mask(run, call, q)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            run.batch(dout),
            run.batch(q),
            _expand_heads(run.batch(k), heads),
            _expand_heads(run.batch(v), heads),
            run.batch(out),
            run.statistics(lse, heads),
            0.0,
            mask is None,
            attn_mask=mask,
            scale=call.scale,
        )
        run.batch(dq).copy_(grads[0])
        run.batch(dk).copy_(_sum_heads(grads[1], kv_heads))
        run.batch(dv).copy_(_sum_heads(grads[2], kv_heads))
    return dq, dk, dv


def _sdpa(run: _Run, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    mask = _window_mask(run, call, q)
    return torch.nn.functional.scaled_dot_product_attention(
        q,
        _expand_heads(k, q.shape[1]),
        _expand_heads(v, q.shape[1]),
        attn_mask=mask,
        is_causal=mask is None,
        scale=call.scale,
    )


def _sdpa_forward(q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall) -> Tensor:
    out = torch.empty_like(q)
    for run in _runs(docs):
        run.batch(out).copy_(_sdpa(run, run.batch(q), run.batch(k), run.batch(v), call))
    return out


def _sdpa_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.empty_like(x) for x in (q, k, v)]
    for run in _runs(docs):
        with torch.enable_grad():
            inputs = [run.batch(x).detach().requires_grad_() for x in (q, k, v)]
            out = _sdpa(run, inputs[0], inputs[1], inputs[2], call)
        for whole, part in zip(grads, torch.autograd.grad(out, inputs, run.batch(dout)), strict=True):
            run.batch(whole).copy_(part)
    return grads[0], grads[1], grads[2]
