"""RoPE, with and without the per-head norm, against autograd in fp64."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.lora import LowRank
from pronghorn.kernels.rope import adapted_rope_, qk_rope_backward, qk_rope_forward
from pronghorn.kernels.triton import rope
from tests.kernels.compare import DTYPES, IMPLS, assert_near, random

# tokens, q heads, k heads, head size, rotated part
SHAPES = [(3, 4, 2, 16, 16), (2, 3, 1, 64, 64), (2, 20, 4, 32, 32), (3, 2, 2, 24, 24), (2, 4, 2, 40, 16)]


def angles(tokens, width, device):
    """cos and sin whose halves differ, so that mixing them up is seen (Transformers repeats one half)."""
    angle = random(tokens, width, dtype=torch.float32, device=device, seed=9)
    return angle.cos(), angle.sin()


def oracle(x, cos, sin, weight=None, eps=0.0, offset=0.0, pairs=False):
    """Transformers' formula: x · cos + rotate_half(x) · sin on the rotated part; Llama's rotate_half or Cohere's."""
    x = x.double()
    if weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight.double() + offset)
    width = cos.shape[-1]
    part, rest = x[..., :width], x[..., width:]
    turned = torch.cat((-part[..., width // 2 :], part[..., : width // 2]), -1)
    if pairs:
        turned = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    return torch.cat((part * cos.double()[:, None] + turned * sin.double()[:, None], rest), -1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm,pairs", [(False, False), (True, False), (False, True), (True, True)])
def test_forward_and_backward(impl, dtype, shape, norm, pairs, device):
    tokens, heads, kv_heads, head_dim, rotated = shape
    q = random(tokens, heads, head_dim, dtype=dtype, device=device)
    k = random(tokens, kv_heads, head_dim, dtype=dtype, device=device, seed=1)
    cos, sin = (a.to(dtype) for a in angles(tokens, rotated, device))
    weights = [random(head_dim, dtype=dtype, device=device, seed=s) if norm else None for s in (2, 3)]
    options = {"q_norm_weight": weights[0], "k_norm_weight": weights[1], "eps": 1e-5, "weight_offset": 0.5}
    options["pairs"] = pairs
    outputs = qk_rope_forward(q, k, cos, sin, **options, impl=impl)
    dys = [random(*x.shape, dtype=dtype, device=device, seed=s) for s, x in ((4, q), (5, k))]
    found = qk_rope_backward(*dys, cos, sin, q=q, k=k, **options, need_weight_grad=norm, impl=impl)
    for i, x in enumerate((q, k)):
        leaf = x.double().requires_grad_()
        weight = weights[i]
        wide = None if weight is None else weight.double().requires_grad_()
        expected = oracle(leaf, cos, sin, wide, 1e-5, 0.5, pairs)
        assert_near(outputs[i], expected)
        leaves = [leaf] if wide is None else [leaf, wide]
        grads = torch.autograd.grad(expected, leaves, dys[i].double())
        assert_near(found[i], grads[0])
        if norm:
            assert_near(found[2 + i], grads[1])
        else:
            assert found[2 + i] is None


@pytest.mark.parametrize("impl", IMPLS)
def test_in_place_on_slices_of_one_buffer(impl, device):
    buffer = random(4, 6 * 16, dtype=torch.float32, device=device)
    before = buffer.clone()
    q, k = buffer[:, :32].view(4, 2, 16), buffer[:, 64:80].view(4, 1, 16)
    cos, sin = angles(4, 16, device)
    expected_q, expected_k = oracle(q, cos, sin), oracle(k, cos, sin)
    q_out, k_out = qk_rope_forward(q, k, cos, sin, inplace=True, impl=impl)
    assert q_out.data_ptr() == q.data_ptr() and k_out.data_ptr() == k.data_ptr()
    assert_near(buffer[:, :32].reshape(4, 2, 16), expected_q)
    assert_near(buffer[:, 64:80].reshape(4, 1, 16), expected_k)
    assert torch.equal(buffer[:, 32:64], before[:, 32:64]) and torch.equal(buffer[:, 80:], before[:, 80:])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (50, 4, 2, 64, 64), (33, 2, 1, 80, 32)])
@pytest.mark.parametrize("ranks,pairs", [((8, 8, 8), False), ((16, 0, 64), True), ((0, 0, 0), False)])
def test_adapters_are_added_on_the_way(impl, dtype, shape, ranks, pairs, device, monkeypatch):
    """q, k, v are column slices of one buffer; the adapters' shares are added before q and k are rotated."""
    if impl == "triton" and shape[0] > 2:  # several heads a program, which few tokens alone would not have
        config = {**rope.adapted_config(shape[0], 8192, 8192), "HEADS": 4}
        monkeypatch.setattr(rope, "adapted_config", lambda *_: config)
    tokens, heads, kv_heads, head_dim, rotated = shape
    counts = (heads, kv_heads, kv_heads)
    buffer = random(tokens, sum(counts) * head_dim + 8, dtype=dtype, device=device)
    cos, sin = (a.to(dtype) for a in angles(tokens, rotated, device))
    xa = random(tokens, max(sum(ranks), 1), dtype=dtype, device=device, seed=3, scale=0.3)
    parts, adapters, expected, at, column = [], [], [], 0, 0
    for i, (count, rank) in enumerate(zip(counts, ranks, strict=True)):
        part = buffer[:, at : at + count * head_dim].view(tokens, count, head_dim)
        whole = part.double()
        adapter = None
        if rank:
            b = random(count * head_dim, rank, dtype=dtype, device=device, seed=4 + i, scale=0.3)
            adapter = LowRank(xa[:, column : column + rank], b, 0.5 + i)
            whole = whole + ((0.5 + i) * adapter.xa.double() @ b.double().t()).view(part.shape)
        parts.append(part)
        adapters.append(adapter)
        expected.append(oracle(whole, cos, sin, pairs=pairs) if i < 2 else whole)
        at, column = at + count * head_dim, column + rank
    beyond, before = buffer[:, at:].clone(), buffer.clone()
    apart = tuple(torch.empty(part.shape, dtype=dtype, device=device) for part in parts)
    adapted_rope_(*parts, cos, sin, tuple(adapters), into=apart, pairs=pairs, impl=impl)
    assert torch.equal(buffer, before)
    adapted_rope_(*parts, cos, sin, tuple(adapters), pairs=pairs, impl=impl)
    for part, new, want in zip(parts, apart, expected, strict=True):
        assert_near(part, want, slack=2.0)
        assert torch.equal(part, new)
    assert torch.equal(buffer[:, at:], beyond)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_of_transposed_gradients(impl, device):
    """Attention may return gradients as [T, N, D] views of [N, T, D]."""
    dq = random(2, 5, 16, dtype=torch.float32, device=device).transpose(0, 1)
    dk = random(1, 5, 16, dtype=torch.float32, device=device, seed=1).transpose(0, 1)
    cos, sin = angles(5, 16, device)
    expected = qk_rope_backward(dq.contiguous(), dk.contiguous(), cos, sin, impl="torch")
    found = qk_rope_backward(dq, dk, cos, sin, inplace=True, impl=impl)
    assert_near(found[0], expected[0])
    assert_near(found[1], expected[1])


def test_a_rotation_is_undone_by_its_transpose(device):
    q = random(4, 2, 16, dtype=torch.float64, device=device)
    half, _ = angles(4, 8, device)
    angle = torch.cat((half, half), -1).double()
    turned, same = qk_rope_forward(q, q.clone(), angle.cos(), angle.sin())
    back, _, _, _ = qk_rope_backward(turned, same, angle.cos(), angle.sin())
    assert_near(back, q)


def test_one_norm_weight_alone_is_refused(device):
    x = torch.zeros(1, 1, 4, device=device)
    with pytest.raises(ValueError, match="both"):
        qk_rope_forward(x, x, x[0], x[0], q_norm_weight=torch.ones(4, device=device))
