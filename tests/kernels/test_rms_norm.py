"""RMSNorm against autograd in fp64."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_forward
from tests.kernels.compare import DTYPES, IMPLS, assert_near, random

SHAPES = [(1, 8), (5, 96), (7, 130), (3, 1024)]


def oracle(x, weight, eps, offset):
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.double() + offset)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("with_residual", [False, True])
def test_forward_and_backward(impl, dtype, shape, offset, with_residual, device):
    rows, width = shape
    x = random(rows, width, dtype=dtype, device=device)
    residual = random(rows, width, dtype=dtype, device=device, seed=1) if with_residual else None
    weight = random(width, dtype=dtype, device=device, seed=2)
    y, rstd, summed = rms_norm_forward(x, weight, 1e-5, residual=residual, weight_offset=offset, impl=impl)
    assert y.dtype == dtype and summed.dtype == dtype
    if residual is None:
        assert summed is x
    else:
        assert_near(summed, x.double() + residual.double())

    leaf = summed.double().requires_grad_()
    wide = weight.double().requires_grad_()
    expected = oracle(leaf, wide, 1e-5, offset)
    assert_near(y, expected)

    dy = random(rows, width, dtype=dtype, device=device, seed=3)
    along = random(rows, width, dtype=dtype, device=device, seed=4) if with_residual else None
    expected_dx, expected_dw = torch.autograd.grad(expected, (leaf, wide), dy.double())
    if along is not None:
        expected_dx = expected_dx + along.double()
    for kept in (rstd, None):
        dx, dw = rms_norm_backward(
            dy,
            summed,
            weight,
            kept,
            eps=1e-5,
            weight_offset=offset,
            residual_grad=along,
            need_weight_grad=True,
            impl=impl,
        )
        assert_near(dx, expected_dx)
        assert_near(dw, expected_dw)
    dx, dw = rms_norm_backward(
        dy, summed, weight, rstd, eps=1e-5, weight_offset=offset, residual_grad=along, impl=impl
    )
    assert dw is None
    assert_near(dx, expected_dx)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_rows_and_mixed_dtypes(impl, device):
    wide = random(6, 200, dtype=torch.float32, device=device)
    x, weight = wide[:, 40:140], random(100, dtype=torch.bfloat16, device=device, seed=1)
    y, rstd, _ = rms_norm_forward(x, weight, 1e-6, out_dtype=torch.bfloat16, impl=impl)
    assert y.dtype == torch.bfloat16
    assert_near(y, oracle(x, weight, 1e-6, 0.0))
    dy = random(6, 100, dtype=torch.bfloat16, device=device, seed=2)
    dx, _ = rms_norm_backward(dy, x, weight, rstd, eps=1e-6, impl=impl)
    assert dx.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_many_rows_share_programs(impl, device):
    """More rows than the weight gradient has programs: each program adds up several."""
    rows = 40 if device.type == "cpu" else 5000
    x, dy = (random(rows, 64, dtype=torch.float32, device=device, seed=s) for s in (1, 2))
    weight = random(64, dtype=torch.float32, device=device)
    leaf, wide = x.double().requires_grad_(), weight.double().requires_grad_()
    _, expected = torch.autograd.grad(oracle(leaf, wide, 1e-5, 0.0), (leaf, wide), dy.double())
    _, dw = rms_norm_backward(dy, x, weight, None, eps=1e-5, need_weight_grad=True, impl=impl)
    assert_near(dw, expected, slack=4)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl, device):
    x, weight = torch.zeros(0, 32, device=device), torch.ones(32, device=device)
    y, rstd, _ = rms_norm_forward(x, weight, 1e-5, impl=impl)
    assert y.shape == (0, 32) and rstd.shape == (0,)
    dx, dw = rms_norm_backward(y, x, weight, rstd, eps=1e-5, need_weight_grad=True, impl=impl)
    assert dx.shape == (0, 32)
    assert torch.equal(dw, torch.zeros(32, device=device))


def test_differentiable(device):
    x = random(4, 24, dtype=torch.float64, device=device).requires_grad_()
    weight = random(24, dtype=torch.float64, device=device, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5, 1.0), (x, weight))
