"""LayerNorm without a bias against autograd in fp64."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.layer_norm import layer_norm, layer_norm_backward, layer_norm_forward
from tests.kernels.compare import DTYPES, IMPLS, assert_near, random

#: rows, width, weights that rows take in turn
SHAPES = [(1, 8, 1), (6, 130, 3), (3, 1024, 1)]


def oracle(x, weight, eps):
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normed.view(-1, *weight.shape) * weight.double()).view(x.shape)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(impl, dtype, shape, device):
    rows, width, groups = shape
    # A mean beside which the variance is small, as residual streams have: E[x²] - E[x]² would lose it.
    x = (random(rows, width, dtype=torch.float32, device=device) + 30.0).to(dtype)
    weight = random(groups, width, dtype=dtype, device=device, seed=2)
    weight = weight[0] if groups == 1 else weight
    leaf, wide = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = oracle(leaf, wide, 1e-5)
    # fp32's 30 has an error of 2e-6, against numbers about 1; the mean over few of them does not hide it.
    slack = 4.0
    y = layer_norm_forward(x, weight, 1e-5, impl=impl)
    assert y.dtype == dtype
    assert_near(y, expected, slack=slack)

    dy = random(rows, width, dtype=dtype, device=device, seed=3)
    along = random(rows, width, dtype=dtype, device=device, seed=4)
    expected_dx, expected_dw = torch.autograd.grad(expected, (leaf, wide), dy.double())
    options = {"eps": 1e-5, "impl": impl}
    dx, dw = layer_norm_backward(dy, x, weight, residual_grad=along, need_weight_grad=True, **options)
    assert_near(dx, expected_dx + along.double(), slack=slack)
    assert dw.shape == weight.shape
    assert_near(dw, expected_dw, slack=slack)
    dx, dw = layer_norm_backward(dy, x, weight, **options)
    assert dw is None
    assert_near(dx, expected_dx, slack=slack)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("groups", [1, 6])
def test_many_rows_share_programs(impl, groups, device):
    """More rows than the weight gradient has programs: each adds up several, of one weight."""
    rows = 60 if device.type == "cpu" else 6000
    x, dy = (random(rows, 64, dtype=torch.float32, device=device, seed=s) for s in (1, 2))
    weight = random(groups, 64, dtype=torch.float32, device=device)
    leaf, wide = x.double().requires_grad_(), weight.double().requires_grad_()
    _, expected = torch.autograd.grad(oracle(leaf, wide, 1e-5), (leaf, wide), dy.double())
    _, dw = layer_norm_backward(dy, x, weight, eps=1e-5, need_weight_grad=True, impl=impl)
    assert_near(dw, expected, slack=4)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_rows_mixed_dtypes_and_none(impl, device):
    wide = random(6, 200, dtype=torch.float32, device=device)
    x, weight = wide[:, 40:140], random(100, dtype=torch.bfloat16, device=device, seed=1)
    y = layer_norm_forward(x, weight, 1e-6, out_dtype=torch.bfloat16, impl=impl)
    assert y.dtype == torch.bfloat16
    assert_near(y, oracle(x, weight, 1e-6))
    dy = random(6, 100, dtype=torch.bfloat16, device=device, seed=2)
    assert layer_norm_backward(dy, x, weight, eps=1e-6, impl=impl)[0].dtype == torch.float32
    nothing = x[:0]
    dx, dw = layer_norm_backward(nothing, nothing, weight, eps=1e-6, need_weight_grad=True, impl=impl)
    assert dx.shape == (0, 100) and torch.equal(dw, torch.zeros(100, device=device))


def test_differentiable(device):
    x = random(4, 24, dtype=torch.float64, device=device).requires_grad_()
    weight = random(24, dtype=torch.float64, device=device, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: layer_norm(x, w, 1e-5), (x, weight))
