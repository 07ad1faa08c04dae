"""Gated outputs against the formulas, and their gradients against autograd in fp64."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.gated_output import gated_output_backward, gated_output_forward
from tests.kernels.compare import DTYPES, IMPLS, assert_near, random


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 3, 40), (33, 2, 128), (1, 1, 24)])
@pytest.mark.parametrize("normed", [False, True])
def test_forward_and_backward(impl, dtype, shape, normed, device):
    out, gate, dy = (random(*shape, dtype=dtype, device=device, seed=s) for s in range(3))
    weight = random(shape[2], dtype=dtype, device=device, seed=3) if normed else None
    leaves = [t.double().requires_grad_() for t in (out, gate, weight) if t is not None]
    if normed:
        rms = (leaves[0].square().mean(-1, keepdim=True) + 1e-6).sqrt()
        expected = leaves[2] * leaves[0] / rms * torch.nn.functional.silu(leaves[1])
    else:
        expected = leaves[0] / (1 + (-leaves[1]).exp())
    options = {"weight": weight, "eps": 1e-6, "impl": impl}
    assert_near(gated_output_forward(out, gate, **options), expected)
    wanted = torch.autograd.grad(expected, leaves, dy.double())
    found = gated_output_backward(dy, out, gate, need_weight_grad=True, **options)
    for actual, want in zip((t for t in found if t is not None), wanted, strict=True):
        assert_near(actual, want, slack=2.0)
    assert gated_output_backward(dy, out, gate, **options)[2] is None
