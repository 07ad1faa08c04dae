"""The heads of latent attention against the formula, and their gradients against autograd in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pronghorn.kernels.latent_heads import latent_heads_backward, latent_heads_forward
from pronghorn.kernels.triton import latent_heads
from tests.kernels.compare import DTYPES, IMPLS, assert_near, random

# tokens, heads, nope, rope, size of v
SHAPES = [(3, 4, 16, 8, 16), (2, 5, 24, 16, 40), (4, 1, 32, 6, 8), (2, 20, 192, 64, 256)]


def turned(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    """x [T, P], one pair of elements at a time."""
    half, parts = cos.shape[1], list(x.unbind(1))
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if pairs else (i, i + half)
        parts[a], parts[b] = (
            x[:, a] * cos[:, i] - x[:, b] * sin[:, i],
            x[:, b] * cos[:, i] + x[:, a] * sin[:, i],
        )
    return torch.stack(parts, 1)


def oracle(q: Tensor, pair: Tensor, shared: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> list[Tensor]:
    nope = q.shape[2] - shared.shape[1]
    key = turned(shared, cos, sin, pairs)
    qs = [torch.cat([q[:, n, :nope], turned(q[:, n, nope:], cos, sin, pairs)], 1) for n in range(q.shape[1])]
    ks = [torch.cat([pair[:, n, :nope], key], 1) for n in range(q.shape[1])]
    return [torch.stack(qs, 1), torch.stack(ks, 1), pair[:, :, nope:]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pairs", [False, True])
def test_forward_and_backward(impl, dtype, shape, pairs, device):
    tokens, heads, nope, rope, of_v = shape
    q = random(tokens, heads, nope + rope, dtype=dtype, device=device)
    pair = random(tokens, heads, nope + of_v, dtype=dtype, device=device, seed=1)
    # Columns of wider buffers, as the blocks pass them.
    shared = random(tokens, 12 + rope, dtype=dtype, device=device, seed=2)[:, 12:]
    angle = random(tokens, rope, dtype=torch.float32, device=device, seed=3)
    cos, sin = (a.to(dtype)[:, : rope // 2] for a in (angle.cos(), angle.sin()))
    leaves = [x.double().requires_grad_() for x in (q, pair, shared)]
    expected = oracle(*leaves, cos.double(), sin.double(), pairs)
    rotated = q.clone()
    options = {"nope": nope, "pairs": pairs, "impl": impl}
    found = (rotated, *latent_heads_forward(rotated, pair, shared, cos, sin, **options))
    for actual, wanted in zip(found, expected, strict=True):
        assert_near(actual, wanted)
    again = latent_heads_forward(None, pair, shared, cos, sin, **options)
    assert all(torch.equal(x, y) for x, y in zip(found[1:], again, strict=True))
    dq, dk = (random(*q.shape, dtype=dtype, device=device, seed=s) for s in (4, 5))
    # Heads that are cut out of wider ones.
    dv = random(tokens, heads, of_v + 8, dtype=dtype, device=device, seed=6)[..., :of_v]
    wanted = torch.autograd.grad(expected, leaves, [x.double() for x in (dq, dk, dv)])
    dpair, dshared = latent_heads_backward(dq, dk, dv, cos, sin, pairs=pairs, impl=impl)
    assert_near(dq, wanted[0])
    assert_near(dpair, wanted[1])
    assert_near(dshared, wanted[2])


def test_groups_of_heads(device, monkeypatch):
    """More heads than a tile has."""
    monkeypatch.setattr(latent_heads, "TILE", 64)
    test_forward_and_backward("triton", torch.float32, (2, 7, 16, 8, 16), True, device)
