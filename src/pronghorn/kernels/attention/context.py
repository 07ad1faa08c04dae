"""New tokens of sequences over contexts that began before them: a prompt's part, or what follows a shared beginning.

    out[t, n] = Σ_j softmax_j(scale · q[t, n]·K[j, n//G]) V[j, n//G],   j ≤ p(t), p(t) - j < window

with p(t) the token's position in its context, whose last tokens are the new ones. A head's sink is one more logit in
the softmax's sum, without a value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pronghorn.kernels.attention.documents import AttentionCall
from pronghorn.kernels.attention.sinks import add_sinks, softmax_with_sinks
from pronghorn.kernels.dispatch import math_dtype

aten = torch.ops.aten


def attend_to_context(
    q: Tensor, contexts: Sequence[Tensor], slices: Sequence[slice], call: AttentionCall, ends: Tensor
) -> Tensor:
    """out [T, N, D] for q [T, N, D]; rows `slices[i]` are the last tokens of contexts[i] [L, 2, K, D], keys before
    values.

    Args:
        ends: int32 [2, contexts + 1] on q's device, where contexts end when laid one after another, and slices; each
            begins with 0. A single context may be longer than that: the rest is not looked at.
    """
    if call.backend in ("cudnn", "flash") and call.softcap is None:
        return _flash(q, contexts, slices, call, ends)
    out = torch.empty_like(q)
    if len(contexts) == 1 and q.device.type == "cpu":
        contexts = [contexts[0][: int(ends[0, 1])]]
    for context, rows in zip(contexts, slices, strict=True):
        out[rows] = _one(q[rows], context, call)
    return out


def _flash(
    q: Tensor, contexts: Sequence[Tensor], slices: Sequence[slice], call: AttentionCall, ends: Tensor
) -> Tensor:
    """FlashAttention-2, whose causal mask ends at the last query and the last key."""
    lengths, counts = [len(c) for c in contexts], [rows.stop - rows.start for rows in slices]
    keys = contexts[0] if len(contexts) == 1 else torch.cat(list(contexts))
    window = {} if call.window is None else {"window_size_left": call.window - 1, "window_size_right": 0}
    out, lse, *_ = aten._flash_attention_forward(
        q, keys[:, 0], keys[:, 1], ends[1], ends[0], max(counts), max(lengths), 0.0, True, False,
        scale=call.scale, **window,
    )  # fmt: skip
    if call.sinks is not None:
        add_sinks(out, lse.t(), call.sinks)
    return out


def _one(q: Tensor, context: Tensor, call: AttentionCall) -> Tensor:
    """One sequence's new tokens [n, N, D] over its context [L, 2, K, D]."""
    count, heads, _ = q.shape
    length, _, kv_heads, _ = context.shape
    position = torch.arange(length - count, length, device=q.device)[:, None]
    key = torch.arange(length, device=q.device)[None]
    allowed = key <= position
    if call.window is not None:
        allowed &= position - key < call.window
    k, v = (context[:, i].transpose(0, 1).repeat_interleave(heads // kv_heads, 0) for i in (0, 1))
    queries = q.transpose(0, 1)
    if call.softcap is None and call.sinks is None:
        out = F.scaled_dot_product_attention(
            queries[None], k[None], v[None], attn_mask=allowed, scale=call.scale
        )[0]
        return out.transpose(0, 1)
    dtype = math_dtype(q.dtype)
    logits = queries.to(dtype) @ k.to(dtype).transpose(1, 2) * call.scale
    if call.softcap is not None:
        logits = logits.div_(call.softcap).tanh_().mul_(call.softcap)
    logits = logits.masked_fill_(~allowed, float("-inf"))
    sinks = None if call.sinks is None else call.sinks.view(-1, 1, 1)
    return (softmax_with_sinks(logits, sinks) @ v.to(dtype)).to(q.dtype).transpose(0, 1)
