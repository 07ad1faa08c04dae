"""The short convolution against torch's over each document, and its gradients against autograd in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pronghorn.kernels.short_conv import short_conv_backward, short_conv_forward
from tests.kernels.compare import DTYPES, IMPLS, assert_near, random
from tests.kernels.test_delta_rule import documents

#: lengths of documents, channels, width
SHAPES = [((37, 0, 2, 1, 30), 131, 4), ((1,), 5, 3), ((2, 66), 64, 2)]


def oracle(x: Tensor, weight: Tensor, bias: Tensor | None, lengths: tuple[int, ...]) -> Tensor:
    parts = []
    for part in x.split([length for length in lengths if length]):
        padded = torch.nn.functional.pad(part.t()[None], (weight.shape[1] - 1, 0))
        z = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=x.shape[1])[0].t()
        parts.append(torch.nn.functional.silu(z))
    return torch.cat(parts)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_forward_and_backward(impl, dtype, shape, has_bias, device):
    lengths, channels, width = shape
    tokens, document = sum(lengths), documents(lengths, device)
    # Columns of a wider buffer.
    x = random(tokens, channels + 8, dtype=dtype, device=device)[:, :channels]
    weight = random(channels, width, dtype=dtype, device=device, seed=1)
    bias = random(channels, dtype=dtype, device=device, seed=2) if has_bias else None
    leaves = [t.double().requires_grad_() for t in (x, weight, bias) if t is not None]
    expected = oracle(leaves[0], leaves[1], leaves[2] if has_bias else None, lengths)
    assert_near(short_conv_forward(x, weight, bias, document, impl=impl), expected)
    dy = random(tokens, channels, dtype=dtype, device=device, seed=3)
    wanted = torch.autograd.grad(expected, leaves, dy.double())
    options = {"need_weight_grad": True, "impl": impl}
    found = [t for t in short_conv_backward(dy, x, weight, bias, document, **options) if t is not None]
    for actual, want in zip(found, wanted, strict=True):
        assert_near(actual, want, slack=2.0)
    dx, *others = short_conv_backward(dy, x, weight, bias, document, impl=impl)
    assert torch.equal(dx, found[0]) and others == [None, None]
