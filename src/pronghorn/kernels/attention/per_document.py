"""Attention document by document, equally long neighbours together: three implementations that need no packed kernel.

"cpu": tiles of queries, whose logits stay in the caches. "sdpa": torch's scaled_dot_product_attention, recomputed in
backward. "eager": the formula written out, where the other two do not go (another device's softcap, or sinks where
there are no statistics); it holds a document's logits, one key-value head at a time.

Statistics of "cpu" and "eager": [T, N] in at least fp32; "sdpa" has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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


def _new_statistics(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


#: Logits that a CPU holds at a time (they stay in its caches), and how many queries of a document they are of.
LOGITS, QUERIES = 1 << 17, (32, 64)


@dataclass(frozen=True)
class _Tile:
    """Queries `start` to `end` of a run's documents, and the keys from `first` to `last` that they may see."""

    start: int
    end: int
    first: int
    last: int

    def mask(self, allowed: Tensor | None, like: Tensor) -> Tensor:
        """What is added to the logits [.., queries, keys]."""
        if allowed is None:
            distance = torch.arange(self.start, self.end)[:, None] - torch.arange(self.first, self.last)
            seen = distance >= 0
        else:
            seen = allowed[..., self.start : self.end, self.first : self.last]
        return torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, float("-inf"))


def _tiles(run: Run, docs: Documents, call: AttentionCall, heads: int) -> Iterator[_Tile]:
    fewest, most = QUERIES
    step = max(fewest, min(most, LOGITS // (run.count * heads * run.length)))
    for start in range(0, run.length, step):
        end = min(run.length, start + step)
        first = 0 if call.window is None else max(0, start - call.window + 1)
        # Tokens may see what comes after them.
        yield _Tile(start, end, first, end if docs.seen_to is None else run.length)


def _short_runs(docs: Documents, heads: int) -> Iterator[Run]:
    """Runs of no more documents than one tile takes."""
    for run in runs(docs):
        most = max(1, LOGITS // (heads * run.length * min(run.length, QUERIES[1])))
        for done in range(0, run.count, most):
            count = min(most, run.count - done)
            yield Run(run.first + done, count, run.start + done * run.length, run.length)


class _Grouped:
    """A run's rows with the query heads of a key-value head side by side: [count, K, G, length, D], contiguous.

    One product then serves the whole group, and sums its gradients of keys and values.
    """

    def __init__(self, run: Run, kv_heads: int) -> None:
        self.run, self.kv_heads = run, kv_heads

    def take(self, x: Tensor) -> Tensor:
        rows = self.run.rows(x).unflatten(2, (self.kv_heads, -1))
        return rows.permute(0, 2, 3, 1, 4).contiguous()

    def put(self, target: Tensor, grouped: Tensor) -> None:
        back = grouped.permute(0, 3, 1, 2, 4).flatten(2, 3)
        self.run.rows(target).copy_(back)


def _tile_logits(
    queries: Tensor,
    keys: Tensor,
    tile: _Tile,
    allowed: Tensor | None,
    wide: torch.dtype,
    softcap: float | None,
) -> Tensor:
    """Capped and masked logits [count, K, G, queries, keys] in `wide`; `keys` [count·K, length, D] are scaled and
    wide."""
    count, kv_heads, group, _, size = queries.shape
    part = queries[:, :, :, tile.start : tile.end].to(wide).reshape(count * kv_heads, -1, size)
    logits = torch.bmm(part, keys[:, tile.first : tile.last].transpose(1, 2))
    logits = logits.view(count, kv_heads, group, tile.end - tile.start, -1)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    mask = tile.mask(allowed, logits)
    # A mask of each document is [count, 1, queries, keys].
    return logits.add_(mask if mask.dim() == 2 else mask.unsqueeze(1))


def cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, docs: Documents, call: AttentionCall
) -> tuple[Tensor, Tensor]:
    """Tile by tile: logits in at least fp32, probabilities times values in q's dtype."""
    out, statistics = torch.empty_like(q), _new_statistics(q)
    wide, size = statistics.dtype, q.shape[2]
    for run in _short_runs(docs, q.shape[1]):
        heads, allowed = _Grouped(run, k.shape[1]), run.allowed(docs, call.window)
        queries = heads.take(q)
        keys, values = (heads.take(x).view(-1, run.length, size) for x in (k, v))
        keys = keys.to(wide) * call.scale
        result, found = torch.empty_like(queries), queries.new_empty(queries.shape[:-1], dtype=wide)
        for tile in _tiles(run, docs, call, q.shape[1]):
            rows = slice(tile.start, tile.end)
            logits = _tile_logits(queries, keys, tile, allowed, wide, call.softcap)
            weights = torch.softmax(logits, -1)
            # log Σ exp, from the largest term's share of the sum: no exponential is computed twice.
            found[..., rows] = logits.amax(-1) - weights.amax(-1).log()
            product = torch.bmm(
                weights.to(q.dtype).view(values.shape[0], -1, weights.shape[-1]),
                values[:, tile.first : tile.last],
            )
            result[..., rows, :] = product.view(*weights.shape[:-1], size)
        heads.put(out, result)
        heads.put(statistics.unsqueeze(-1), found.unsqueeze(-1))
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
    """P = softmax(S), dV = Pᵀ dO, dS = P ∘ (dO Vᵀ - Σ P ∘ dO Vᵀ), dQ = scale · dS K, dK = scale · dSᵀ Q.

    S, dO Vᵀ and the sums of dK and dV over tiles are at least fp32, P and dS enter products in q's dtype. With sinks a
    row of P sums to less than 1: to what the statistics say.
    """
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    wide, size = lse.dtype, q.shape[2]
    for run in _short_runs(docs, q.shape[1]):
        heads, allowed = _Grouped(run, k.shape[1]), run.allowed(docs, call.window)
        queries, above = heads.take(q), heads.take(dout)
        keys, values = (heads.take(x).view(-1, run.length, size).to(wide) for x in (k, v))
        keys = keys * call.scale  # not in place: it may still be k
        low_keys = keys.to(q.dtype)
        statistics = heads.take(lse.unsqueeze(-1)) if call.sinks is not None else None
        dqueries, dkeys, dvalues = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for tile in _tiles(run, docs, call, q.shape[1]):
            rows, seen = slice(tile.start, tile.end), slice(tile.first, tile.last)
            logits = _tile_logits(queries, keys, tile, allowed, wide, call.softcap)
            weights = torch.softmax(logits, -1)
            if statistics is not None:
                without_sink = logits.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
                weights.mul_((without_sink - statistics[..., rows, :]).exp_())
            query, gradient = (x[..., rows, :].reshape(keys.shape[0], -1, size) for x in (queries, above))
            shape = (keys.shape[0], -1, weights.shape[-1])
            dvalues[:, seen] += torch.bmm(weights.to(q.dtype).view(shape).transpose(1, 2), gradient)
            dweights = torch.bmm(gradient.to(wide), values[:, seen].transpose(1, 2)).view_as(weights)
            dlogits = aten._softmax_backward_data(dweights, weights, -1, wide)
            if call.softcap is not None:
                # tanh' = 1 - tanh²; what the mask hides has no gradient anyway, and -∞ is not to make it one.
                dlogits.mul_(1 - logits.clamp_(min=-call.softcap).div_(call.softcap).square_())
            dlogits = dlogits.to(q.dtype).view(shape)
            dqueries[..., rows, :] = torch.bmm(dlogits, low_keys[:, seen]).view(*weights.shape[:-1], size)
            dkeys[:, seen] += torch.bmm(dlogits.transpose(1, 2), query)
        dkeys.mul_(call.scale)
        for target, gradient in ((dq, dqueries), (dk, dkeys), (dv, dvalues)):
            heads.put(target, gradient.view(run.count, k.shape[1], -1, run.length, size))
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
