"""A prompt's rotation with its entries in the cache, against the formulas of both."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.cached_rope import rope_into_cache
from pronghorn.kernels.decode_attention import Heads
from tests.kernels.compare import DTYPES, IMPLS, assert_near, random
from tests.kernels.test_rope import SHAPES, angles, oracle

BLOCKS, BLOCK = 3, 4


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (5, 12, 9, 16, 16)])
@pytest.mark.parametrize("norm,pairs", [(False, False), (True, False), (False, True)])
def test_against_the_formulas(impl, dtype, shape, norm, pairs, device):
    tokens, many, kv_heads, size, rotated = shape
    qkv = random(tokens, (many + 2 * kv_heads) * size, dtype=dtype, device=device)
    cos, sin = (a.to(dtype) for a in angles(tokens, rotated, device))
    weights = [random(size, dtype=dtype, device=device, seed=s) if norm else None for s in (2, 3)]
    heads = Heads(many, kv_heads, size, 1.0, None, *weights, eps=1e-5, norm_offset=0.5)
    cache = random(BLOCKS, BLOCK, 2, kv_heads, size, dtype=dtype, device=device, seed=4)
    places = torch.tensor([9, 2, 11, 0, 5][:tokens], device=device)
    expected = cache.flatten(0, 1).clone().double()
    parts = qkv.clone().view(tokens, -1, size).split((many, kv_heads, kv_heads), 1)
    q, k = (oracle(x, cos, sin, w, 1e-5, 0.5, pairs) for x, w in zip(parts, weights, strict=False))
    expected[places] = torch.stack([k, parts[2].double()], 1)

    found = rope_into_cache(qkv, cos, sin, cache, places, heads, pairs=pairs, impl=impl)
    assert_near(found[0], q)
    assert_near(found[1], k)
    assert torch.equal(found[2], parts[2])
    kept = cache.flatten(0, 1)
    assert_near(kept, expected)
    others = torch.ones(len(kept), dtype=torch.bool)
    others[places] = False
    assert torch.equal(kept[others], expected[others].to(dtype))
    assert torch.equal(kept[places], torch.stack(found[1:], 1)), "what is cached is what was attended to"
