"""Gated linear units against autograd in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pronghorn.kernels.glu import ACTIVATIONS, glu_backward, glu_forward
from tests.kernels.compare import DTYPES, IMPLS, assert_near, random

ORACLES = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (2, 1500)])
@pytest.mark.parametrize("inplace", [False, True])
def test_forward_and_backward(impl, dtype, activation, shape, inplace, device):
    rows, width = shape
    both = random(rows, 2 * width, dtype=dtype, device=device, scale=3.0)
    gate, up = both[:, :width], both[:, width:]
    dact = random(rows, width, dtype=dtype, device=device, seed=2)
    leaves = [gate.double().requires_grad_(), up.double().requires_grad_()]
    expected = ORACLES[activation](leaves[0]) * leaves[1]
    grads = torch.autograd.grad(expected, leaves, dact.double())
    assert_near(glu_forward(gate, up, activation, impl=impl), expected)
    act, dgate, dup = glu_backward(dact, gate, up, activation, inplace=inplace, impl=impl)
    assert_near(act, expected)
    assert_near(dgate, grads[0])
    assert_near(dup, grads[1])
    if inplace:
        assert [t.data_ptr() for t in (act, dgate, dup)] == [t.data_ptr() for t in (dact, gate, up)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_inputs_stay_finite(impl, activation, device):
    gate = torch.tensor([[-200.0, -30.0, 0.0, 30.0, 200.0]], device=device)
    ones = torch.ones_like(gate)
    assert glu_forward(gate, ones, activation, impl=impl).isfinite().all()
    _, dgate, _ = glu_backward(ones, gate, ones, activation, impl=impl)
    assert_near(dgate, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=device))


def test_unknown_activation(device):
    x = torch.zeros(1, 4, device=device)
    with pytest.raises(ValueError, match="relu"):
        glu_forward(x, x, "relu")
