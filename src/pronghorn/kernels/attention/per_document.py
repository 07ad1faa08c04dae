"""Attention document by document, equally long neighbours together: three implementations that need no packed kernel.

"cpu": torch's CPU flash kernel. "sdpa": torch's scaled_dot_product_attention, recomputed in backward. "eager": the
formula written out, for what the other two cannot do (softcap; sinks where there are no statistics); it holds a
document's logits, one key-value head at a time.

Statistics of "cpu" and "eager": [T, N] in at least fp32; "sdpa" has none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.attention.documents import AttentionCall, Documents, Run, runs

aten = torch.ops.aten


def _additive(run: Run, docs: Documents, call: AttentionCall, like: Tensor) -> Tensor | None:
    """The mask as numbers to add, in `like`'s dtype; None where plain causal."""
    allowed = run.allowed(docs, call.window)
    if allowed is None:
        return None
    return torch.zeros_like(allowed, dtype=like.dtype).masked_fill_(~allowed, float("-inf"))


def _expand_heads(x: Tensor, heads: int) -> Tensor:
    """[B, K, S, D] -> [B, N, S, D], each key-value head repeated for its group of query heads."""
    group = heads // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _sum_heads(grad: Tensor, kv_heads: int) -> Tensor:
    """The gradient of `_expand_heads`."""
    if grad.shape[1] == kv_heads:
        return grad
    return grad.unflatten(1, (kv_heads, -1)).sum(2)


def _new_statistics(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


def cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    out, statistics = torch.empty_like(q), _new_statistics(q)
    for run in runs(docs):
        mask = _additive(run, docs, call, q)
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
        run.batch(statistics).copy_(lse)
    return out, statistics


def cpu_backward(
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
    for run in runs(docs):
        mask = _additive(run, docs, call, q)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            run.batch(dout),
            run.batch(q),
            _expand_heads(run.batch(k), heads),
            _expand_heads(run.batch(v), heads),
            run.batch(out),
            run.batch(lse),
            0.0,
            mask is None,
            attn_mask=mask,
            scale=call.scale,
        )
        run.batch(dq).copy_(grads[0])
        run.batch(dk).copy_(_sum_heads(grads[1], kv_heads))
        run.batch(dv).copy_(_sum_heads(grads[2], kv_heads))
    return dq, dk, dv


def _sdpa(run: Run, q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall) -> Tensor:
    mask = _additive(run, docs, call, q)
    return torch.nn.functional.scaled_dot_product_attention(
        q,
        _expand_heads(k, q.shape[1]),
        _expand_heads(v, q.shape[1]),
        attn_mask=mask,
        is_causal=mask is None,
        scale=call.scale,
    )


def sdpa_forward(
    q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    for run in runs(docs):
        run.batch(out).copy_(_sdpa(run, run.batch(q), run.batch(k), run.batch(v), docs, call))
    return out, q.new_empty(0, dtype=torch.float32)


def sdpa_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    docs: Documents,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.empty_like(x) for x in (q, k, v)]
    for run in runs(docs):
        with torch.enable_grad():
            inputs = [run.batch(x).detach().requires_grad_() for x in (q, k, v)]
            again = _sdpa(run, inputs[0], inputs[1], inputs[2], docs, call)
        for whole, part in zip(grads, torch.autograd.grad(again, inputs, run.batch(dout)), strict=True):
            run.batch(whole).copy_(part)
    return grads[0], grads[1], grads[2]


def _logits(q: Tensor, k: Tensor, allowed: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Masked logits [B, G, S, S] of one key-value head and the softcap's derivative (None without one)."""
    logits = torch.einsum("bgsd,btd->bgst", q, k).mul_(call.scale)
    slope = None
    if call.softcap is not None:
        bent = logits.div_(call.softcap).tanh_()
        slope = 1 - bent.square()
        logits = bent.mul_(call.softcap)
    return logits.masked_fill_(~allowed, float("-inf")), slope


def _causal(run: Run, docs: Documents, call: AttentionCall, device: torch.device) -> Tensor:
    allowed = run.allowed(docs, call.window)
    if allowed is None:
        allowed = torch.ones(run.length, run.length, dtype=torch.bool, device=device).tril_()
    return allowed


def eager_forward(
    q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    out, statistics = torch.empty_like(q), _new_statistics(q)
    wide = statistics.dtype
    for run in runs(docs):
        allowed = _causal(run, docs, call, q.device)
        for head in range(k.shape[1]):
            mine = slice(head * group, (head + 1) * group)
            keys, values = (run.rows(x)[:, :, head].to(wide) for x in (k, v))
            logits, _ = _logits(run.batch(q)[:, mine].to(wide), keys, allowed, call)
            lse = logits.logsumexp(-1)
            run.batch(statistics)[:, mine].copy_(lse)
            weights = logits.sub_(lse.unsqueeze(-1)).exp_()
            run.batch(out)[:, mine].copy_(torch.einsum("bgst,btd->bgsd", weights, values))
    return out, statistics


def eager_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    docs: Documents,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """dV = Pᵀ dO, dS = P ∘ (dO Vᵀ - Σ dO∘O) ∘ softcap', dQ = scale · dS K, dK = scale · dSᵀ Q."""
    group, wide = q.shape[1] // k.shape[1], lse.dtype
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for run in runs(docs):
        allowed = _causal(run, docs, call, q.device)
        for head in range(k.shape[1]):
            mine = slice(head * group, (head + 1) * group)
            keys, values = (run.rows(x)[:, :, head].to(wide) for x in (k, v))
            queries, above, below = (run.batch(x)[:, mine].to(wide) for x in (q, dout, out))
            logits, slope = _logits(queries, keys, allowed, call)
            weights = logits.sub_(run.batch(lse)[:, mine].unsqueeze(-1)).exp_()
            run.rows(dv)[:, :, head].copy_(torch.einsum("bgst,bgsd->btd", weights, above))
            delta = (above * below).sum(-1, keepdim=True)
            dlogits = torch.einsum("bgsd,btd->bgst", above, values).sub_(delta).mul_(weights)
            if slope is not None:
                dlogits.mul_(slope)
            dlogits.mul_(call.scale)
            run.batch(dq)[:, mine].copy_(torch.einsum("bgst,btd->bgsd", dlogits, keys))
            run.rows(dk)[:, :, head].copy_(torch.einsum("bgst,bgsd->btd", dlogits, queries))
    return dq, dk, dv
