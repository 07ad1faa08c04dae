"""Weights multiplied in int8, and the module that holds them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from pronghorn.kernels import int8
from pronghorn.kernels.lora import LowRank
from pronghorn.weights import Int8Linear, Int8Weight, Operand, read_weight, stacked
from pronghorn.weights.int8_linear import fits_int8

#: turned in blocks of 16 forward and of 32 in the input gradient
OUT, IN, ROWS, RANK = 96, 80, 7, 5


def linear(bias: bool = True, out: int = OUT) -> nn.Linear:
    torch.manual_seed(out)
    module = nn.Linear(IN, out, bias=bias).requires_grad_(False)
    # Rows of very different size, for row scales to matter.
    module.weight *= torch.logspace(-6, 2, out, base=2)[:, None]
    return module


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hadamard(width: int) -> Tensor:
    """H [width, width] in fp64: blocks of 2x2 matrices multiplied out, apart from the code under test."""
    block, matrix = int8.rotation_of(width), torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return torch.block_diag(*[matrix / block**0.5] * (width // block))


def rounded(rows: Tensor) -> Tensor:
    """Rows [T, W] of 127 steps to either side, in fp64."""
    scale = rows.abs().amax(1, keepdim=True) / 127
    return (rows / scale).round() * scale


def near(found: Tensor, expected: Tensor) -> None:
    """As near as fp32 is: a number in the middle of two codes may fall to either, one in a row of 80 or 96."""
    assert ((found.double() - expected).norm() / expected.norm()).item() < 2e-4


@pytest.mark.parametrize("copies", [1, 2])
def test_products_are_those_of_the_codes(copies):
    """In fp64 and apart from the code under test."""
    plain = linear()
    module = Int8Linear.of(plain, copies=copies)
    weight = read_weight(module)
    assert isinstance(weight, Int8Weight) and weight.label == "quantised" and weight.fuses
    assert weight.storage == ("int8" if copies == 1 else "int8 two")
    x, dy = drawn(ROWS, IN), drawn(ROWS, OUT, seed=2)
    turn_in, turn_out, w = hadamard(IN), hadamard(OUT), plain.weight.double()

    stored = rounded(w @ turn_in)
    near(weight.dense(torch.float64), stored @ turn_in)
    expected = rounded(x.double() @ turn_in) @ stored.t()
    y = weight.matmul(x)
    near(y, expected)
    assert torch.equal(weight.matmul(x, module.bias), y + module.bias)
    assert torch.equal(weight.matmul_add_(torch.ones(ROWS, OUT), x), 1 + y)

    if copies == 2:
        expected = rounded(dy.double() @ turn_out) @ rounded(w.t() @ turn_out).t()
    else:
        scales = stored.abs().amax(1, keepdim=True) / 127
        expected = rounded(dy.double() * scales.t()) @ (stored / scales) @ turn_in
    dx = weight.matmul_t(dy)
    near(dx, expected)
    assert torch.equal(weight.matmul_t_add_(torch.ones(ROWS, IN), dy), 1 + dx)


@pytest.mark.parametrize("copies", [1, 2])
def test_what_a_product_adds(copies):
    weight = read_weight(Int8Linear.of(linear(False), copies=copies))
    x, dy, xa = drawn(ROWS, IN), drawn(ROWS, OUT, seed=2), drawn(ROWS, RANK, seed=3)
    a, b = drawn(RANK, IN, seed=4), drawn(OUT, RANK, seed=5)
    residual = drawn(ROWS, OUT, seed=6)
    y = weight.matmul_fused(x, LowRank(xa, b, 0.5), residual)
    near(y, weight.matmul(x).double() + 0.5 * xa.double() @ b.double().t() + residual)
    out = residual.clone()
    assert weight.matmul_fused(x, LowRank(xa, b, 0.5), out, out=out) is out and torch.equal(out, y)
    before = drawn(ROWS, IN, seed=7)
    dx = weight.matmul_t_fused(dy, LowRank(xa, a.t(), 1.0), before)
    near(dx, weight.matmul_t(dy).double() + xa.double() @ a.double() + before)


def test_error_against_the_unquantised_product():
    """Rows turned hold normal numbers, the largest of 80 at 2.5 deviations: steps of 2.5/127, an error of a step/√12
    each, 0.6 %, 0.8 % for both factors."""
    module = linear(bias=False)
    x, dy = drawn(64, IN), drawn(64, OUT, seed=2)
    outlying = x.clone()
    outlying[:, 3] *= 50  # alone it would leave the others 5 steps
    for copies in (1, 2):
        weight = read_weight(Int8Linear.of(module, copies=copies))
        pairs = [(weight.matmul(rows), rows @ module.weight.t()) for rows in (x, outlying)]
        for got, exact in (*pairs, (weight.matmul_t(dy), dy @ module.weight)):
            assert 0.002 < ((got - exact).norm() / exact.norm()).item() < 0.015
        # Column by column: the smallest outputs are as good as the largest.
        y, exact = pairs[0]
        assert ((y - exact).norm(dim=0) / exact.norm(dim=0)).max() < 0.02


@pytest.mark.parametrize("copies", [1, 2])
def test_a_group_lies_side_by_side(copies):
    linears = [linear(False, out) for out in (64, 192, 64)]
    modules = Int8Linear.group(linears, copies=copies)
    weights = [read_weight(module) for module in modules]
    stack = stacked(weights)
    assert stack is not None and stack.shape == (320, IN) and stack.storage == weights[0].storage
    x, dys = drawn(ROWS, IN), [drawn(ROWS, w.shape[0], seed=i) for i, w in enumerate(weights)]
    assert torch.equal(stack.matmul(x), torch.cat([w.matmul(x) for w in weights], 1))

    dx = stack.matmul_t(stack.operand_of(dys))
    wide = torch.cat(dys, 1)
    assert torch.equal(dx, stack.matmul_t(wide))
    assert torch.equal(dx, stack.matmul_t(stack.operand_of(wide.split([64, 192, 64], 1))))
    exact = wide @ torch.cat([module.weight for module in linears])
    assert (dx - exact).norm() / exact.norm() < 0.02
    # Each on its own, with the group's scales.
    apart = sum(w.matmul_t(dy) for w, dy in zip(weights, dys, strict=True))
    assert (apart - exact).norm() / exact.norm() < 0.02

    assert stacked(weights[1:]) is not None and stacked([weights[1], weights[0]]) is None
    moved = copy.deepcopy(modules)
    assert stacked([read_weight(module) for module in moved]) is None
    assert torch.equal(read_weight(moved[1]).matmul_t(dys[1]), weights[1].matmul_t(dys[1]))


def test_outputs_that_blocks_do_not_fit():
    """64 divides the sum of 32 and 96 alone: the modules have codes of their own for the input gradient."""
    linears = [linear(False, out) for out in (32, 96)]
    modules = Int8Linear.group(linears)
    weights = [read_weight(module) for module in modules]
    assert stacked(weights) is None
    alone = read_weight(Int8Linear.of(linears[1]))
    dy = drawn(ROWS, 96)
    assert torch.equal(weights[1].matmul_t(dy), alone.matmul_t(dy))


def test_a_shared_operand_is_quantised_once(monkeypatch):
    calls = []
    plain = int8.quantise_rows

    def counted(x, columns=None, **given):
        calls.append(given["rotated"])
        return plain(x, columns, **given)

    monkeypatch.setattr(int8, "quantise_rows", counted)
    two, one = (read_weight(Int8Linear.of(linear(), copies=copies)) for copies in (2, 1))
    calls.clear()
    x = Operand(drawn(ROWS, IN))
    first = two.matmul(x)
    assert torch.equal(two.matmul(x), first) and calls == [True]
    assert torch.equal(one.matmul(x), first) and calls == [True]
    dy = Operand(drawn(ROWS, OUT, seed=2))
    assert torch.equal(one.matmul_t(dy), one.matmul_t(dy)) and calls == [True, False]
    assert torch.equal(two.matmul_t(dy), two.matmul_t(dy)) and calls == [True, False, True]

    made = Operand(x.tensor, int8=plain(x.tensor, rotated=True))
    assert torch.equal(two.matmul(made), first) and len(calls) == 3
    again = Operand.with_codes(x.tensor, *made.made)
    assert torch.equal(two.matmul(again), first) and len(calls) == 3
    made.release()
    assert made.made is None


def test_forward_of_the_module_is_the_dequantised_product():
    module = Int8Linear.of(linear())
    x = drawn(2, ROWS, IN).requires_grad_()
    y = module(x)
    assert torch.equal(y, torch.nn.functional.linear(x, module.dense()) + module.bias)
    dy = drawn(2, ROWS, OUT, seed=2)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, dy @ module.dense())
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_casts_copies_and_files_keep_the_values():
    module, dy = Int8Linear.of(linear()), drawn(ROWS, OUT)
    values, dx = module.dense(), module.stored().matmul_t(dy)
    for other in (copy.deepcopy(module).half().float(), copy.deepcopy(module).to(torch.bfloat16)):
        assert torch.equal(other.dense(torch.float32), values) and other.weight_scale.dtype == torch.float32
        assert torch.equal(other.stored().matmul_t(dy), dx)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = Int8Linear.of(nn.Linear(IN, OUT))
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh.dense(), values) and torch.equal(fresh.stored().matmul_t(dy), dx)
    assert torch.equal(module.to_linear().weight, values) and type(module.to_linear()) is nn.Linear


def test_what_does_not_fit():
    assert fits_int8(nn.Linear(32, 16)) and not fits_int8(nn.Linear(32, 20))
    assert not fits_int8(nn.Linear(36, 16)) and not fits_int8(nn.Embedding(32, 16))
    assert not fits_int8(Int8Linear.of(nn.Linear(32, 16)))
