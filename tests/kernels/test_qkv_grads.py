"""Gradients of q, k and v as columns of one matrix: the rotation's transpose and a copy, to the bit."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.fp8 import quantise_joined
from pronghorn.kernels.qkv_grads import unrotate_joined, unrotate_joined_fp8
from pronghorn.kernels.rope import qk_rope_backward
from pronghorn.weights import side_by_side
from tests.kernels.compare import DTYPES, IMPLS, assert_near, random
from tests.kernels.test_rope import SHAPES, angles


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 4, 2, 16, 16)])
@pytest.mark.parametrize("pairs", [False, True])
def test_columns_of_one_matrix(impl, dtype, shape, pairs, device):
    tokens, heads, kv_heads, head_dim, rotated = shape
    dq, dk, dv = (
        random(tokens, n, head_dim, dtype=dtype, device=device, seed=n)
        for n in (heads, kv_heads, kv_heads + 20)
    )
    dv = dv[:, :kv_heads]  # rows of a wider buffer
    cos, sin = angles(tokens, rotated, device)
    before = dq.clone()
    found = unrotate_joined(dq, dk, dv, cos, sin, pairs=pairs, impl=impl)
    assert torch.equal(dq, before) and side_by_side(found, 1).is_contiguous()
    if not tokens:
        return
    wide = [x.double() for x in (dq, dk, cos, sin)]
    expected = qk_rope_backward(*wide, pairs=pairs, impl="torch")[:2]
    for got, want in zip(found, expected, strict=False):
        assert_near(got, want.flatten(1))
    assert torch.equal(found[2], dv.flatten(1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 4, 2, 16, 16)])
@pytest.mark.parametrize("exponents,pairs", [(False, False), (True, False), (False, True)])
def test_codes_beside_them(impl, shape, exponents, pairs, device):
    tokens, heads, kv_heads, head_dim, rotated = shape
    parts = [
        random(tokens, n, head_dim, dtype=torch.bfloat16, device=device, seed=n)
        for n in (heads, kv_heads, kv_heads)
    ]
    cos, sin = angles(tokens, rotated, device)
    width = (heads + 2 * kv_heads) * head_dim
    columns = (torch.arange(width, device=device) % 7 - 3).to(torch.int8)
    columns = columns if exponents else torch.ldexp(torch.ones(width, 1, device=device), columns[:, None])
    found, (codes, scales) = unrotate_joined_fp8(*parts, cos, sin, columns, pairs=pairs, impl=impl)
    expected = unrotate_joined(*parts, cos, sin, pairs=pairs, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if tokens:
        same, same_scales = quantise_joined(expected, columns, impl=impl)
        assert torch.equal(scales, same_scales) and torch.equal(codes.float(), same.float())
