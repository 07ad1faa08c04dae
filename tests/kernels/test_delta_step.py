"""One token at a time against whole streams: the short convolution and the gated delta rule with what they remember."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pronghorn.kernels.attention import Documents
from pronghorn.kernels.delta_gates import delta_gates_forward
from pronghorn.kernels.delta_rule import delta_rule_forward
from pronghorn.kernels.delta_step import DeltaWeights, delta_rule_step, short_conv_step
from pronghorn.kernels.gated_output import gated_output_forward
from pronghorn.kernels.short_conv import short_conv_forward
from tests.kernels.compare import assert_near, random

#: (dtype, impl, slack of the tolerance)
WAYS = [(torch.float64, "torch", 100.0), (torch.float32, "torch", 4.0), (torch.float32, "triton", 4.0)]
TOKENS, SLOTS = 6, (3, 0)


def stream(lengths: tuple[int, ...], device: torch.device) -> Documents:
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return Documents(bounds, max(lengths), lengths)


@pytest.mark.parametrize(("dtype", "impl", "slack"), WAYS)
@pytest.mark.parametrize(("width", "biased"), [(4, False), (4, True), (2, False)])
def test_convolution(dtype, impl, slack, width, biased, device):
    channels = 300
    x = random(2 * TOKENS, channels, dtype=torch.float64, device=device, seed=0)
    weight = random(channels, width, dtype=torch.float64, device=device, seed=1)
    bias = random(channels, dtype=torch.float64, device=device, seed=2) if biased else None
    docs = stream((TOKENS, TOKENS), device)
    expected = short_conv_forward(x, weight, bias, docs.document_of_token(2 * TOKENS)).view(
        2, TOKENS, channels
    )
    memory = random(4, width - 1, channels, dtype=dtype, device=device, seed=3)
    others = memory[1:3].clone()
    slots = torch.tensor(SLOTS, dtype=torch.int32, device=device)
    memory[slots.long()] = 0
    rows = x.to(dtype).view(2, TOKENS, channels)
    cast = None if bias is None else bias.to(dtype)
    for t in range(TOKENS):
        wider = torch.cat([rows[:, t], rows[:, t]], 1)[:, :channels]
        found = short_conv_step(wider, weight.to(dtype), cast, memory, slots, impl=impl)
        assert_near(found, expected[:, t], slack=slack)
    assert torch.equal(memory[slots.long()], rows[:, TOKENS - width + 1 :]) and torch.equal(
        memory[1:3], others
    )


def rule_inputs(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, DeltaWeights]:
    """[q | k | v] and [z | b | a] of two documents in fp64."""
    k_heads, heads, of_k, of_v = shape
    qkv = random(2 * TOKENS, 2 * k_heads * of_k + heads * of_v, dtype=torch.float64, device=device, seed=0)
    others = random(2 * TOKENS, heads * (of_v + 2), dtype=torch.float64, device=device, seed=1) * 3
    decay, bias = (random(heads, dtype=torch.float64, device=device, seed=s) for s in (2, 3))
    norm = 1 + 0.3 * random(of_v, dtype=torch.float64, device=device, seed=4)
    return qkv, others, DeltaWeights(decay, bias - 2, norm, 1e-6)


@pytest.mark.parametrize(("dtype", "impl", "slack"), WAYS)
@pytest.mark.parametrize("shape", [(2, 4, 16, 32), (1, 1, 32, 16)])
def test_rule(dtype, impl, slack, shape, device):
    k_heads, heads, of_k, of_v = shape
    qkv, others, weights = rule_inputs(shape, device)
    width, rows = k_heads * of_k, 2 * TOKENS
    z, b, a = others.split([heads * of_v, heads, heads], 1)
    q, k, v = qkv.split([width, width, heads * of_v], 1)
    g, beta = delta_gates_forward(a, b, weights.decay, weights.dt_bias)
    parts = q.view(rows, -1, of_k), k.view(rows, -1, of_k), v.view(rows, -1, of_v)
    out = delta_rule_forward(*parts, g, beta, stream((TOKENS, TOKENS), device))
    expected = gated_output_forward(
        out, z.reshape(rows, heads, of_v).contiguous(), weight=weights.norm, eps=weights.eps
    )
    expected = expected.reshape(2, TOKENS, -1)
    cast = DeltaWeights(*(x.to(dtype) for x in (weights.decay, weights.dt_bias, weights.norm)), weights.eps)
    states = random(4, heads, of_k, of_v, dtype=dtype, device=device, seed=7)
    kept = states[1:3].clone()
    slots = torch.tensor(SLOTS, dtype=torch.int32, device=device)
    states[slots.long()] = 0
    for t in range(TOKENS):
        one = qkv.to(dtype).view(2, TOKENS, -1)[:, t].contiguous()
        wide = others.to(dtype).view(2, TOKENS, -1)[:, t]
        found = delta_rule_step(
            one, *wide.split([heads * of_v, heads, heads], 1), cast, states, slots, impl=impl
        )
        assert_near(found, expected[:, t], slack=slack)
    assert torch.equal(states[1:3], kept)


def test_gates_far_from_zero(device):
    """softplus of large and of very small numbers, as the kernel puts it together."""
    qkv, others, weights = rule_inputs((1, 1, 16, 16), device)
    for raw in (-12.0, -6.0, 25.0):
        spread = DeltaWeights(weights.decay, torch.full_like(weights.dt_bias, raw), weights.norm, weights.eps)
        z, b, _ = others[:1].split([16, 1, 1], 1)
        given = [x.float() for x in (qkv[:1], z, b, torch.zeros_like(b))]
        cast = DeltaWeights(*(x.float() for x in (spread.decay, spread.dt_bias, spread.norm)), spread.eps)
        found = []
        for impl in ("torch", "triton"):
            states = torch.ones(1, 1, 16, 16, device=device)
            delta_rule_step(*given, cast, states, torch.zeros(1, dtype=torch.int32, device=device), impl=impl)
            found.append(states)
        torch.testing.assert_close(*found, atol=1e-6, rtol=1e-6)
