"""One new token a sequence over a cache in blocks, against the formula in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pronghorn.kernels.decode_attention import Heads, Paged, Rotation, decode_attention
from tests.kernels.compare import IMPLS, RELATIVE, random

POSITIONS = 320
BLOCK = 64


def spelled_out(qkv, contexts, lengths, heads, rotation):
    """(out, k, v of the new tokens) in fp64; contexts[b] [past, 2, K, D]."""
    cos, sin = rotation.cos, rotation.sin
    turned_width = cos.shape[1]

    def turned(x, position, weight):
        if weight is not None:
            rstd = (x.square().mean(-1, keepdim=True) + heads.eps).rsqrt()
            x = x * rstd * (weight.double() + heads.norm_offset)
        part, rest = x[..., :turned_width], x[..., turned_width:]
        if rotation.pairs:
            other = torch.stack([-part[..., 1::2], part[..., ::2]], -1).flatten(-2)
        else:
            first, second = part.chunk(2, -1)
            other = torch.cat([-second, first], -1)
        part = part * cos[position].double() + other * sin[position].double()
        return torch.cat([part, rest], -1)

    outs, news = [], []
    for b, length in enumerate(lengths):
        if not length:
            outs.append(None)
            news.append(None)
            continue
        x = qkv[b].double().view(-1, heads.head_dim)
        row = length - 1
        if rotation.switch is not None and length > rotation.switch:
            row += rotation.switch
        q = turned(x[: heads.heads], row, heads.q_norm)
        k = turned(x[heads.heads : heads.heads + heads.kv_heads], row, heads.k_norm)
        v = x[heads.heads + heads.kv_heads :]
        k = k.to(qkv.dtype).double()  # as the cache holds it
        keys = torch.cat([contexts[b][:, 0].double(), k[None]])
        values = torch.cat([contexts[b][:, 1].double(), v[None]])
        if heads.window is not None:
            keys, values = keys[-heads.window :], values[-heads.window :]
        shared = heads.heads // heads.kv_heads
        logits = torch.einsum("nd,lnd->nl", q, keys.repeat_interleave(shared, 1)) * heads.scale
        if heads.softcap is not None:
            logits = heads.softcap * torch.tanh(logits / heads.softcap)
        if heads.sinks is not None:
            logits = torch.cat([logits, heads.sinks.double()[:, None]], 1)
        weights = logits.softmax(-1)[:, : len(values)]
        outs.append(torch.einsum("nl,lnd->nd", weights, values.repeat_interleave(shared, 1)))
        news.append((k, v))
    return outs, news


def check(
    impl,
    device,
    lengths,
    dtype=torch.float32,
    n=4,
    kv=2,
    size=16,
    turned=None,
    norms=False,
    sinks=False,
    switch=None,
    pairs=False,
    **options,
):
    norm = random(size, dtype=dtype, device=device, seed=9) if norms else None
    heads = Heads(
        n, kv, size, size**-0.5, q_norm=norm, k_norm=norm, norm_offset=1.0 if norms else 0.0, **options
    )
    if sinks:
        # From those that hardly count to those that take nearly all.
        own = torch.linspace(-2.0, 8.0, n).to(device, dtype)
        heads = replace(heads, sinks=own)
    angles = random(POSITIONS + (switch or 0), turned or size, dtype=torch.float32, device=device, seed=1)
    rotation = Rotation(angles.cos().to(dtype), angles.sin().to(dtype), switch, pairs)
    generator = torch.Generator().manual_seed(2)
    counts = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    cache = random(len(order), BLOCK, 2, kv, size, dtype=dtype, device=device, seed=3)
    qkv = random(len(lengths), (n + 2 * kv) * size, dtype=dtype, device=device, seed=4)
    blocks, tables = [], torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int32)
    for b, count in enumerate(counts):
        blocks.append([order.pop() for _ in range(count)])
        tables[b, :count] = torch.tensor(blocks[b], dtype=torch.int32)
    contexts = [
        cache[torch.tensor(blocks[b], dtype=torch.long, device=device)]
        .flatten(0, 1)[: max(length - 1, 0)]
        .clone()
        for b, length in enumerate(lengths)
    ]
    expected, news = spelled_out(qkv, contexts, lengths, heads, rotation)
    before = cache.clone()
    paged = Paged(tables.to(device), torch.tensor(lengths, dtype=torch.int32, device=device))
    for _ in range(2):  # counters are left as they were found
        cache.copy_(before)
        found = decode_attention(qkv.clone(), cache, paged, heads, rotation, impl=impl).double()
        for b, length in enumerate(lengths):
            if not length:
                continue
            # Weighted means of values; weights and the new key are rounded to the cache's dtype, q, too.
            torch.testing.assert_close(
                found[b].view(n, size), expected[b], rtol=0, atol=6 * RELATIVE[dtype] * 3 + 2e-5
            )
            place = blocks[b][(length - 1) // BLOCK], (length - 1) % BLOCK
            for kept, new in zip(cache[place], news[b], strict=True):
                torch.testing.assert_close(
                    kept.double(), new, rtol=2 * RELATIVE[dtype], atol=2 * RELATIVE[dtype]
                )
            before[place] = cache[place]
        assert torch.equal(cache, before), "something else in the cache was written"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [[1], [300], [1, 64, 65, 0, 200]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths(impl, lengths, dtype, device):
    check(impl, device, lengths, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "options",
    [
        {"n": 6, "kv": 1}, {"n": 2, "kv": 2, "size": 24}, {"norms": True}, {"window": 70}, {"window": 1},
        {"softcap": 2.0}, {"turned": 8}, {"sinks": True}, {"switch": 129}, {"pairs": True},
        {"pairs": True, "turned": 8, "norms": True},
        {"sinks": True, "n": 6, "kv": 1, "window": 64, "softcap": 2.0},
        {"n": 8, "kv": 4, "size": 32, "window": 64, "norms": True},
    ],
)  # fmt: skip
def test_kinds_of_heads(impl, options, device):
    check(impl, device, [130, 0, 63, 290], **options)


@pytest.mark.parametrize("splits", [1, 2, 16])
def test_a_context_may_be_split(splits, device, monkeypatch):
    from pronghorn.kernels.triton import decode_attention as module

    monkeypatch.setattr(module, "splits", lambda *arguments: splits)
    check("triton", device, [300, 5, 129], sinks=splits == 16)
