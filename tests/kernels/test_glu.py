"""Gated linear units against autograd in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pronghorn.kernels.glu import (
    ACTIVATIONS,
    glu_backward,
    glu_backward_down_,
    glu_forward,
    glu_forward_down,
)
from pronghorn.kernels.lora import LowRank
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
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (70, 100)])
@pytest.mark.parametrize("ranks", [(8, 8), (4, 32), (0, 16), (128, 0)])
@pytest.mark.parametrize("inplace", [False, True])
def test_adapters_are_added_on_the_way_in(impl, dtype, shape, ranks, inplace, device):
    """Gate and up without their adapters' share give what the whole ones give, with one rounding less."""
    rows, width = shape
    both = random(rows, 2 * width, dtype=dtype, device=device)
    gate, up = both[:, :width], both[:, width:]
    dact = random(rows, width, dtype=dtype, device=device, seed=2)
    xa = random(rows, sum(ranks), dtype=dtype, device=device, seed=3, scale=0.3)
    adapters, leaves = [], []
    for i, (base, part, rank) in enumerate(zip((gate, up), xa.split(list(ranks), 1), ranks, strict=True)):
        b = random(width, rank, dtype=dtype, device=device, seed=4 + i, scale=0.3)
        adapters.append(LowRank(part, b, 0.5 + i) if rank else None)
        leaves.append((base.double() + (0.5 + i) * part.double() @ b.double().t()).requires_grad_())
    expected = F.silu(leaves[0]) * leaves[1]
    grads = torch.autograd.grad(expected, leaves, dact.double())
    given = {"gate_adapter": adapters[0], "up_adapter": adapters[1], "impl": impl}
    assert_near(glu_forward(gate, up, "silu", **given), expected, slack=2.0)
    found = glu_backward(dact, gate, up, "silu", inplace=inplace, **given)
    for one, want in zip(found, (expected, *grads), strict=True):
        assert_near(one, want, slack=2.0)
    if inplace:
        assert [t.data_ptr() for t in found] == [t.data_ptr() for t in (dact, gate, up)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (70, 300), (130, 100)])
@pytest.mark.parametrize("ranks", [(0, 0, 4), (8, 8, 16), (0, 16, 64)])
def test_with_the_down_projections_adapter(impl, dtype, shape, ranks, device):
    """The activation is multiplied where it is made: XA in forward, the gradient of A in backward."""
    rows, width = shape
    both = random(rows, 2 * width, dtype=dtype, device=device)
    gate, up = both[:, :width], both[:, width:]
    dact = random(rows, width, dtype=dtype, device=device, seed=2)
    a = random(ranks[2], width, dtype=dtype, device=device, seed=6, scale=0.3)
    dxa = random(rows, ranks[2], dtype=dtype, device=device, seed=7)
    adapters = []
    for i, rank in enumerate(ranks[:2]):
        xa = random(rows, max(rank, 1), dtype=dtype, device=device, seed=8 + i, scale=0.3)
        b = random(width, max(rank, 1), dtype=dtype, device=device, seed=10 + i, scale=0.3)
        adapters.append(LowRank(xa, b, 0.5 + i) if rank else None)
    given = {"gate_adapter": adapters[0], "up_adapter": adapters[1], "impl": impl}
    act, xa = glu_forward_down(gate, up, "silu", a, **given)
    whole = [
        g.double() if d is None else d.add_to(g.double()) for g, d in zip((gate, up), adapters, strict=True)
    ]
    leaves = [t.requires_grad_() for t in whole]
    expected = F.silu(leaves[0]) * leaves[1]
    want_dgate, want_dup = torch.autograd.grad(expected, leaves, dact.double() + dxa.double() @ a.double())
    expected = expected.detach()
    assert_near(act, expected, slack=2.0)
    # The product takes act as it was rounded.
    assert_near(xa, act.double() @ a.double().t(), slack=2.0)
    grad = torch.full(a.shape, 3.0, dtype=torch.float32, device=device)
    glu_backward_down_(dact, gate, up, "silu", dxa, a, grad, **given)
    # The reference rounds the sum of both shares of dact before it goes on.
    assert_near(gate, want_dgate, slack=2.0 if impl == "triton" else 8.0)
    assert_near(up, want_dup, slack=2.0 if impl == "triton" else 8.0)
    want = 3 + dxa.double().t() @ expected
    unit = 2.0**-6 if dtype == torch.bfloat16 else 2.0**-9 if dtype == torch.float16 else 1e-5
    assert (grad.double() - want).abs().max() <= unit * want.abs().max()


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


def _row_max_inputs(dtype, device, adapted):
    rows, width = 70, 300
    both = random(rows, 2 * width, dtype=dtype, device=device)
    gate, up = both[:, :width], both[:, width:]
    dact = random(rows, width, dtype=dtype, device=device, seed=2)
    adapters = {}
    for i, name in enumerate(("gate_adapter", "up_adapter") if adapted else ()):
        xa = random(rows, 8, dtype=dtype, device=device, seed=3 + i)
        adapters[name] = LowRank(xa, random(width, 8, dtype=dtype, device=device, seed=5 + i), 0.5)
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-20, 20, (2, width), generator=generator).to(device, torch.int8)
    return gate, up, dact, adapters, (exponents[0], exponents[1])


def _at_least(row_max, *parts):
    """The rows' largest magnitudes in fp32, and what the caller had put there."""
    sizes = [part.float().abs() if e is None else part.float().abs() * 2.0 ** e.float() for part, e in parts]
    return torch.stack([row_max, *(size.amax(1) for size in sizes)]).amax(0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("with_down", [False, True])
def test_row_maxima_forward(impl, dtype, adapted, with_down, device):
    gate, up, _, adapters, _ = _row_max_inputs(dtype, device, adapted)
    before = torch.linspace(0, 4, gate.shape[0], device=device)
    row_max, given = before.clone(), {**adapters, "impl": impl}
    if with_down:
        a = random(16, gate.shape[1], dtype=dtype, device=device, seed=9)
        act, xa = glu_forward_down(gate, up, "silu", a, row_max=row_max, **given)
        for found, want in zip((act, xa), glu_forward_down(gate, up, "silu", a, **given), strict=True):
            assert torch.equal(found, want)
    else:
        act = glu_forward(gate, up, "silu", row_max=row_max, **given)
        assert torch.equal(act, glu_forward(gate, up, "silu", **given))
    assert torch.equal(row_max, _at_least(before, (act, None)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("with_down", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_row_maxima_backward(impl, dtype, adapted, with_down, scaled, device):
    gate, up, dact, adapters, exponents = _row_max_inputs(dtype, device, adapted)
    before = torch.linspace(0, 4, gate.shape[0], device=device)
    row_max, given = before.clone(), {**adapters, "impl": impl}
    wanted = {"row_max": row_max, "exponents": exponents if scaled else None}
    if with_down:
        dxa = random(gate.shape[0], 16, dtype=dtype, device=device, seed=8)
        a = random(16, gate.shape[1], dtype=dtype, device=device, seed=9)
        outs = []
        for more in ({}, wanted):
            dgate, dup, da = gate.clone(), up.clone(), torch.zeros(a.shape, device=device)
            glu_backward_down_(dact, dgate, dup, "silu", dxa, a, da, **more, **given)
            outs.append((dgate, dup, da))
    else:
        outs = [glu_backward(dact, gate, up, "silu", **more, **given)[1:] for more in ({}, wanted)]
    for found, want in zip(outs[1], outs[0], strict=True):
        assert torch.equal(found, want)
    parts = zip(outs[0][:2], exponents if scaled else (None, None), strict=True)
    assert torch.equal(row_max, _at_least(before, *parts))
