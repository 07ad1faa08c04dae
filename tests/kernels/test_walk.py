"""Four products of one row in one launch: the formula in fp64, and what a second launch finds of the first."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pronghorn.kernels.glu import APPROXIMATE
from pronghorn.kernels.matvec import RowNorm
from pronghorn.kernels.walk import Meeting, Product, Walk, fits_walk, walk
from tests.kernels.compare import RELATIVE, random

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
#: the kernel is written in Gluon, which has no interpreter
IMPLS = ["torch", *(["triton"] if HOPPER else [])]
#: attended, hidden, inner, outs: whole and partial tiles; fewer outputs than programs
SHAPES = [(256, 128, 320, 136), (1536, 1536, 1216, 2048), (2048, 4096, 1792, 264)]


def product(width, outs, dtype, device, seed, norm=False, bias=True):
    weight = random(outs, width, dtype=dtype, device=device, seed=seed) * width**-0.5
    of_input = RowNorm(random(width, dtype=dtype, device=device, seed=seed + 1), 1e-5, 1.0) if norm else None
    return Product(
        weight, random(outs, dtype=dtype, device=device, seed=seed + 2) if bias else None, of_input
    )


def steps_of(shape, dtype, device, activation, bias):
    attended, hidden, inner, outs = shape
    return Walk(
        product(attended, hidden, dtype, device, 1, bias=bias),
        product(hidden, 2 * inner, dtype, device, 4, norm=True, bias=bias),
        product(inner, hidden, dtype, device, 7, bias=bias),
        product(hidden, outs, dtype, device, 10, norm=True, bias=bias),
        activation,
    )


def applied(step, x):
    x = x.double()
    if step.norm is not None:
        rstd = (x.square().mean(1, keepdim=True) + step.norm.eps).rsqrt()
        x = x * rstd * (step.norm.weight.double() + step.norm.offset)
    y = x @ step.weight.double().t()
    return y if step.bias is None else y + step.bias.double()


def expected(attended, x, steps):
    """Each product's result rounded as it is stored."""
    x = (x.double() + applied(steps.o, attended)).to(x.dtype)
    gate, up = applied(steps.gate_up, x).chunk(2, 1)
    kind = steps.activation
    value = F.silu(gate) if kind == "silu" else F.gelu(gate, approximate=APPROXIMATE[kind])
    x = (x.double() + applied(steps.down, (value * up).to(x.dtype))).to(x.dtype)
    return applied(steps.last, x), x


def near(actual, wanted, dtype):
    difference = (actual.double() - wanted.double()).norm() / wanted.double().norm()
    assert difference < 4 * RELATIVE[dtype] + 1e-5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation, bias", [("silu", False), ("gelu", True), ("gelu_tanh", True)])
def test_formula(impl, shape, activation, bias, device):
    dtype = torch.bfloat16
    steps = steps_of(shape, dtype, device, activation, bias)
    if impl == "triton" and not fits_walk(steps):
        pytest.skip("the kernel does not take these")
    meeting = Meeting(*(torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)))
    for seed in range(3):
        attended = random(1, shape[0], dtype=dtype, device=device, seed=20 + seed)
        x = random(1, shape[1], dtype=dtype, device=device, seed=30 + seed)
        wanted, summed = expected(attended, x, steps)
        y = walk(attended, x, steps, meeting, out_dtype=torch.float32, impl=impl)
        assert y.dtype == torch.float32
        near(x, summed, dtype)
        near(y, wanted, dtype)
        assert int(meeting.lost) == 0


@pytest.mark.skipif(not HOPPER, reason="needs a kernel")
def test_programs_that_wait_in_vain_are_counted(device, monkeypatch):
    from pronghorn.kernels.triton import walk as kernel

    steps = steps_of(SHAPES[1], torch.bfloat16, device, "silu", False)
    meeting = Meeting(*(torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)))
    attended, x = (random(1, 1536, dtype=torch.bfloat16, device=device, seed=seed) for seed in (20, 30))
    monkeypatch.setattr(kernel, "PATIENCE", 1)
    walk(attended, x, steps, meeting, impl="triton")
    assert int(meeting.lost) > 0


@pytest.mark.skipif(not HOPPER, reason="only a kernel has conditions")
def test_weights_it_does_not_take(device):
    def fits(shape, dtype=torch.bfloat16):
        return fits_walk(steps_of(shape, dtype, device, "silu", False))

    assert fits((1536, 1536, 8960, 2048)) and fits((4096, 4096, 14336, 6144))
    assert not fits((1536, 1536, 8960, 2048), torch.float16)
    assert not fits((1536, 1536, 8960, 2044))  # outputs that are no pairs of groups
    assert not fits((896, 896, 4864, 1152))  # more than a quarter of the ring would be empty
