"""Four products of one row in one launch: the formula in fp64, and what a second launch finds of the first."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pronghorn.kernels.glu import APPROXIMATE
from pronghorn.kernels.matvec import RowNorm
from pronghorn.kernels.walk import Adapters, Meeting, Product, Walk, fits_walk, walk
from tests.kernels.compare import RELATIVE, random

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
#: the kernel is written in Gluon, which has no interpreter
IMPLS = ["torch", *(["triton"] if HOPPER else [])]
#: attended, hidden, inner, outs: whole and partial tiles; fewer outputs than programs
SHAPES = [(256, 128, 320, 136), (1536, 1536, 1216, 2048), (2048, 4096, 1792, 264)]


def adapters(width, ends, rank, dtype, device, seed):
    """Of three slots, the first for none."""
    a = random(3, len(ends) * rank, width, dtype=dtype, device=device, seed=seed) * width**-0.5
    b = random(3, ends[-1], rank, dtype=dtype, device=device, seed=seed + 1) * rank**-0.5
    a[0] = b[0] = 0.0
    return Adapters(a, b, ends)


def product(width, outs, dtype, device, seed, norm=False, bias=True, ends=None, rank=0):
    weight = random(outs, width, dtype=dtype, device=device, seed=seed) * width**-0.5
    of_input = RowNorm(random(width, dtype=dtype, device=device, seed=seed + 1), 1e-5, 1.0) if norm else None
    added = random(outs, dtype=dtype, device=device, seed=seed + 2) if bias else None
    adapter = adapters(width, ends or (outs,), rank, dtype, device, seed + 40) if rank else None
    return Product(weight, added, of_input, adapter)


def steps_of(shape, dtype, device, activation, bias, ranks=(0, 0, 0, 0)):
    attended, hidden, inner, outs = shape
    three = (outs // 2, outs // 2 + outs // 4 // 4 * 4, outs)  # q, k, v
    return Walk(
        product(attended, hidden, dtype, device, 1, bias=bias, rank=ranks[0]),
        product(
            hidden, 2 * inner, dtype, device, 4, norm=True, bias=bias, ends=(inner, 2 * inner), rank=ranks[1]
        ),
        product(inner, hidden, dtype, device, 7, bias=bias, rank=ranks[2]),
        product(hidden, outs, dtype, device, 10, norm=True, bias=bias, ends=three, rank=ranks[3]),
        activation,
    )


def applied(step, x, slot):
    x = x.double()
    if step.norm is not None:
        rstd = (x.square().mean(1, keepdim=True) + step.norm.eps).rsqrt()
        x = x * rstd * (step.norm.weight.double() + step.norm.offset)
    y = x @ step.weight.double().t()
    if step.adapter is not None:
        a, b, ends = step.adapter[0][slot].double(), step.adapter[1][slot].double(), step.adapter[2]
        rank, starts = b.shape[1], (0, *ends[:-1])
        parts = [
            x @ a[p * rank : (p + 1) * rank].t() @ b[start:end].t()
            for p, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]
        y = y + torch.cat(parts, 1)
    return y if step.bias is None else y + step.bias.double()


def expected(attended, x, steps, slot=0):
    """Each product's result rounded as it is stored."""
    x = (x.double() + applied(steps.o, attended, slot)).to(x.dtype)
    gate, up = applied(steps.gate_up, x, slot).chunk(2, 1)
    kind = steps.activation
    value = F.silu(gate) if kind == "silu" else F.gelu(gate, approximate=APPROXIMATE[kind])
    x = (x.double() + applied(steps.down, (value * up).to(x.dtype), slot)).to(x.dtype)
    return applied(steps.last, x, slot), x


def near(actual, wanted, dtype):
    difference = (actual.double() - wanted.double()).norm() / wanted.double().norm()
    assert difference < 4 * RELATIVE[dtype] + 1e-5


def inputs(shape, dtype, device, seed):
    return tuple(
        random(1, width, dtype=dtype, device=device, seed=first + seed)
        for width, first in ((shape[0], 20), (shape[1], 30))
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation, bias", [("silu", False), ("gelu", True), ("gelu_tanh", True)])
def test_formula(impl, shape, activation, bias, device):
    dtype = torch.bfloat16
    steps = steps_of(shape, dtype, device, activation, bias)
    if impl == "triton" and not fits_walk(steps):
        pytest.skip("the kernel does not take these")
    meeting = Meeting.beside(torch.zeros(1, dtype=torch.int64, device=device))
    for seed in range(3):
        attended, x = inputs(shape, dtype, device, seed)
        wanted, summed = expected(attended, x, steps)
        y = walk(attended, x, steps, meeting, out_dtype=torch.float32, impl=impl)
        assert y.dtype == torch.float32
        near(x, summed, dtype)
        near(y, wanted, dtype)
        assert int(meeting.lost) == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [(16, 16, 16, 16), (0, 16, 0, 32), (32, 0, 16, 0)])
def test_adapters(impl, shape, ranks, device):
    """Of the slots 1 and 2, and of none; what was handed on in the walk before is not taken."""
    dtype = torch.bfloat16
    steps = steps_of(shape, dtype, device, "silu", False, ranks)
    if impl == "triton" and not fits_walk(steps):
        pytest.skip("the kernel does not take these")
    meeting = Meeting.beside(torch.zeros(1, dtype=torch.int64, device=device))
    plain, _ = expected(*inputs(shape, dtype, device, 1), steps)
    for slot in (1, 2, 0):
        attended, x = inputs(shape, dtype, device, slot)
        wanted, summed = expected(attended, x, steps, slot)
        slots = torch.tensor([slot], dtype=torch.int32, device=device)
        y = walk(attended, x, steps, meeting, slots=slots, out_dtype=torch.float32, impl=impl)
        near(x, summed, dtype)
        near(y, wanted, dtype)
        assert int(meeting.lost) == 0
        if slot == 1:  # an adapter that changed nothing would show nothing
            assert (wanted - plain).norm() > 0.1 * plain.norm()


@pytest.mark.skipif(not HOPPER, reason="needs a kernel")
def test_programs_without_a_last_round_add_nothing(device):
    """A few programs have a group of `inner` more than fit into one round; what the others never wrote is no number."""
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl

    @gluon.jit
    def _spoil(out_ptr, nothing):
        layout: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
        memory = gl.allocate_shared_memory(gl.float32, [48, 1024], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        for i in range(48):
            memory.index(i).store(gl.full([1024], float("nan"), gl.float32, layout))
        gl.store(out_ptr + gl.arange(0, 1024, layout), memory.index(nothing).load(layout))

    dtype, programs = torch.bfloat16, torch.cuda.get_device_properties(device).multi_processor_count
    shape = (2048, 4096, 4 * 32 * programs // 64 * 64 + 64, 264)
    steps = steps_of(shape, dtype, device, "silu", False, (0, 0, 16, 0))
    assert fits_walk(steps)
    meeting = Meeting.beside(torch.zeros(1, dtype=torch.int64, device=device))
    attended, x = inputs(shape, dtype, device, 1)
    wanted, summed = expected(attended, x, steps, 1)
    slots = torch.tensor([1], dtype=torch.int32, device=device)
    _spoil[(programs,)](torch.empty(1024, device=device), 0, num_warps=4)
    y = walk(attended, x, steps, meeting, slots=slots, out_dtype=torch.float32, impl="triton")
    near(x, summed, dtype)
    near(y, wanted, dtype)


@pytest.mark.skipif(not HOPPER, reason="needs a kernel")
def test_programs_that_wait_in_vain_are_counted(device, monkeypatch):
    from pronghorn.kernels.triton import walk as kernel

    steps = steps_of(SHAPES[1], torch.bfloat16, device, "silu", False)
    meeting = Meeting.beside(torch.zeros(1, dtype=torch.int64, device=device))
    attended, x = inputs(SHAPES[1], torch.bfloat16, device, 0)
    monkeypatch.setattr(kernel, "PATIENCE", 1)
    walk(attended, x, steps, meeting, impl="triton")
    assert int(meeting.lost) > 0


def test_shares_are_fp32_whatever_a_new_tensor_is():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert Meeting.beside(torch.zeros(1, dtype=torch.int64)).shares.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_one_adapter_for_gate_and_up_is_not_taken_for_two(device, monkeypatch):
    """Phi and GLM have gate and up in one module."""
    kernel = pytest.importorskip("pronghorn.kernels.triton.walk")
    monkeypatch.setattr(kernel, "processors", lambda index: 132)
    monkeypatch.setattr(kernel, "_room", lambda index: 191 * 1024)
    steps = steps_of(SHAPES[1], torch.bfloat16, device, "silu", False, (16, 16, 16, 16))
    assert kernel.fits(steps)
    _, hidden, inner, _ = SHAPES[1]
    whole = product(hidden, 2 * inner, torch.bfloat16, device, 4, norm=True, bias=False, rank=16)
    assert not kernel.fits(steps._replace(gate_up=whole))


@pytest.mark.skipif(not HOPPER, reason="only a kernel has conditions")
def test_weights_it_does_not_take(device):
    def fits(shape, dtype=torch.bfloat16):
        return fits_walk(steps_of(shape, dtype, device, "silu", False))

    assert fits((1536, 1536, 8960, 2048)) and fits((4096, 4096, 14336, 6144))
    assert not fits((1536, 1536, 8960, 2048), torch.float16)
    assert not fits((1536, 1536, 8960, 2044))  # outputs that are no pairs of groups
    assert not fits((896, 896, 4864, 1152))  # more than a quarter of the ring would be empty
