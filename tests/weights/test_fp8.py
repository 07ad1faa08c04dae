"""Weights multiplied in fp8, and the module that holds them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from pronghorn.kernels import fp8
from pronghorn.weights import (
    Fp8GradWeight,
    Fp8Linear,
    Fp8Weight,
    Operand,
    keep_expanded,
    lay_side_by_side,
    operand,
    read_weight,
    stacked,
)
from pronghorn.weights.four_bit import add_fp8_products
from pronghorn.weights.fp8_linear import (
    add_fp8_input_grad,
    fits_fp8,
    renew_fp8_input_grads,
)

OUT, IN, ROWS = 48, 80, 7


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    module = nn.Linear(IN, OUT, bias=bias).requires_grad_(False)
    # Rows of very different size, for row scales to matter.
    module.weight *= torch.logspace(-6, 2, OUT, base=2)[:, None]
    return module.to(dtype)


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounding(exact: torch.Tensor) -> torch.Tensor:
    """fp32 sums of up to 80 products, in units of the largest result."""
    return 80 * 2**-24 * exact.abs().max()


@pytest.mark.parametrize("rowwise", [True, False])
@pytest.mark.parametrize("copies", [1, 2])
def test_products_are_those_of_the_quantised_factors(rowwise, copies):
    """In fp64 and apart from the code under test: x̂ @ Ŵᵀ and (dy·s)^ @ C."""
    module = Fp8Linear.of(linear(), rowwise=rowwise)
    module.keep_transposed(copies == 2)
    weight = read_weight(module)
    assert isinstance(weight, Fp8Weight) and weight.label == "quantised"
    assert weight.storage == ("fp8" if copies == 1 else "fp8 two") and weight.quantises_rows is rowwise
    x, dy, stored = drawn(ROWS, IN), drawn(ROWS, OUT, seed=2), weight.dense(torch.float64)

    quantise = fp8.quantise_rows if rowwise else fp8.quantise_tensor
    codes, scales = quantise(x)
    expected = (codes.double() * scales.double()) @ stored.t()
    y = weight.matmul(x)
    assert ((y - expected).abs() <= rounding(expected)).all()
    assert torch.equal(weight.matmul(x, module.bias), y + module.bias)
    assert torch.equal(weight.matmul_add_(torch.ones(ROWS, OUT), x), 1 + y)
    assert not weight.adds_forward and not weight.adds_input_grad

    codes, scales = quantise(dy * module.weight_scale.view(-1) if rowwise else dy)
    values = module.codes.double() * (1 if rowwise else module.weight_scale.double())
    expected = (codes.double() * scales.double()) @ values
    dx = weight.matmul_t(dy)
    assert ((dx - expected).abs() <= rounding(expected)).all()
    assert torch.equal(weight.matmul_t_add_(torch.ones(ROWS, IN), dy), 1 + dx)


def test_error_against_the_unquantised_product():
    """Both factors are off by 2^-4 of themselves at most; uniformly spread, that is a relative rms of
    2^-4/√3 / 1.44 = 2.5 % each (1.44: the mean of a mantissa in its binade), 3.5 % together."""
    module = linear(bias=False)
    weight = read_weight(Fp8Linear.of(module))
    x, dy = drawn(64, IN), drawn(64, OUT, seed=2)
    for got, exact in ((weight.matmul(x), x @ module.weight.t()), (weight.matmul_t(dy), dy @ module.weight)):
        assert 0.02 < ((got - exact).norm() / exact.norm()).item() < 0.045
    # Row by row: the smallest outputs are as good as the largest.
    y, exact = weight.matmul(x), x @ module.weight.t()
    assert ((y - exact).norm(dim=0) / exact.norm(dim=0)).max() < 0.07


@pytest.mark.parametrize("copies", [1, 2])
def test_a_stack_is_its_parts(copies):
    modules = [Fp8Linear.of(nn.Linear(IN, out, bias=False)) for out in (48, 16, 32)]
    for module in modules:
        module.keep_transposed(copies == 2)
    values = [module.dense() for module in modules]
    assert stacked([read_weight(m) for m in modules]) is None
    lay_side_by_side(modules)
    weights = [read_weight(module) for module in modules]
    assert all(torch.equal(m.dense(), v) for m, v in zip(modules, values, strict=True))
    stack = stacked(weights)
    assert stack is not None and stack.shape == (96, IN)
    x, dys = drawn(ROWS, IN), [drawn(ROWS, w.shape[0], seed=i) for i, w in enumerate(weights)]
    assert torch.equal(stack.matmul(x), torch.cat([w.matmul(x) for w in weights], 1))

    dx = stack.matmul_t(Operand.joined(dys, stack.columns))
    assert torch.equal(stack.exponents, fp8.exponents_of(stack.scales).view(-1))
    assert torch.equal(dx, stack.matmul_t(torch.cat(dys, 1)))
    exact = sum(dy @ value for dy, value in zip(dys, values, strict=True))
    assert (dx - exact).norm() / exact.norm() < 0.04  # one factor is rounded: 2.5 % rms

    assert stacked(weights[1:]) is not None and stacked([weights[1], weights[0]]) is None
    assert stacked([read_weight(m) for m in copy.deepcopy(modules)]) is None
    modules[1].to(torch.float16)
    assert torch.equal(modules[1].dense(torch.float32), values[1])


def test_a_shared_operand_is_quantised_once(monkeypatch):
    calls = []

    def counted(x, columns=None, **known):
        calls.append(columns is None)
        return fp8.quantise_rows(x, columns, **known)

    monkeypatch.setattr(operand, "quantise_rows", counted)
    weight = read_weight(Fp8Linear.of(linear()))
    x = Operand(drawn(ROWS, IN))
    first = weight.matmul(x)
    assert torch.equal(weight.matmul(x), first) and calls == [True]
    dy = Operand(drawn(ROWS, OUT, seed=2))
    assert torch.equal(weight.matmul_t(dy), weight.matmul_t(dy)) and calls == [True, False]

    made = Operand(x.tensor, fp8=fp8.quantise_rows(x.tensor))
    assert torch.equal(weight.matmul(made), first) and calls == [True, False]


def test_forward_of_the_module_is_the_dequantised_product():
    module = Fp8Linear.of(linear())
    x = drawn(2, ROWS, IN).requires_grad_()
    y = module(x)
    assert torch.equal(y, torch.nn.functional.linear(x, module.dense()) + module.bias)
    dy = drawn(2, ROWS, OUT, seed=2)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, dy @ module.dense())
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_casts_copies_and_files_keep_the_values():
    module = Fp8Linear.of(linear())
    values = module.dense()
    for other in (copy.deepcopy(module).half().float(), copy.deepcopy(module).to(torch.bfloat16)):
        assert torch.equal(other.dense(torch.float32), values) and other.weight_scale.dtype == torch.float32
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = Fp8Linear.of(nn.Linear(IN, OUT))
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh.dense(), values)
    assert torch.equal(module.to_linear().weight, values) and type(module.to_linear()) is nn.Linear


def test_what_does_not_fit():
    assert fits_fp8(nn.Linear(32, 16)) and not fits_fp8(nn.Linear(32, 20)) and not fits_fp8(nn.Linear(36, 16))
    assert not fits_fp8(Fp8Linear.of(nn.Linear(32, 16))) and not fits_fp8(nn.Embedding(32, 16))


@pytest.mark.parametrize("rowwise", [True, False])
@pytest.mark.parametrize("keep_codes", [True, False])
def test_input_gradient_alone(keep_codes, rowwise):
    module = linear()
    plain = read_weight(module)
    add_fp8_input_grad(module, rowwise=rowwise, keep_codes=keep_codes)
    weight = read_weight(module)
    assert isinstance(weight, Fp8GradWeight) and weight.label == "quantised" and not weight.quantises_rows
    assert weight.adds_forward and not weight.adds_input_grad
    assert weight.ready(module.weight.dtype) is None  # no kernel multiplies the weight itself
    x, dy = drawn(ROWS, IN), drawn(ROWS, OUT, seed=2)
    assert torch.equal(weight.matmul(x, module.bias), plain.matmul(x, module.bias))
    full = read_weight(Fp8Linear.of(module, rowwise=rowwise))
    assert torch.equal(weight.matmul_t(dy), full.matmul_t(dy))
    before = weight.matmul_t(dy)
    assert [*module.state_dict()] == ["weight", "bias"]

    module.weight.data *= 2
    renew_fp8_input_grads(module)
    assert torch.equal(read_weight(module).matmul_t(dy), 2 * before)
    module.weight.requires_grad_(True)
    assert type(read_weight(module)) is type(plain)


@pytest.mark.parametrize("double", [False, True])
def test_four_bits_multiplied_in_fp8(double):
    bnb = pytest.importorskip("bitsandbytes")
    module = bnb.nn.Linear4bit(
        128, 48, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=double
    )
    module = module.to("cpu")
    module.support_avx512bf16_for_cpu = False
    plain = read_weight(module)
    assert add_fp8_products(module)
    weight = read_weight(module)
    assert weight.storage.startswith("nf4") and weight.storage.endswith("in fp8 products")
    assert torch.equal(weight.dense(torch.float32), plain.dense(torch.float32))
    x, dy = drawn(ROWS, 128), drawn(ROWS, 48, seed=2)
    codes, scales = fp8.quantise_rows(x)
    expanded = weight.codes_forward().float() * weight.scales
    expected = (codes.float() * scales) @ expanded.t()
    torch.testing.assert_close(weight.matmul(x), expected, rtol=0, atol=rounding(expected).item())
    assert torch.equal(weight.codes_input_grad().float(), weight.codes_forward().float().t())
    # NF4's values are rounded once more, by 2.5 % rms, in both products.
    for got, exact in ((weight.matmul(x), plain.matmul(x)), (weight.matmul_t(dy), plain.matmul_t(dy))):
        assert ((got - exact).norm() / exact.norm()).item() < 0.045


@pytest.mark.parametrize("in_fp8", [False, True])
def test_expanded_weights_are_kept_and_let_go(in_fp8):
    bnb = pytest.importorskip("bitsandbytes")
    module = bnb.nn.Linear4bit(128, 48, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    if in_fp8:
        add_fp8_products(module)
    x, dy = drawn(ROWS, 128).bfloat16(), drawn(ROWS, 48, seed=2).bfloat16()
    weight = read_weight(module)
    before = weight.matmul(x), weight.matmul_t(dy), weight.dense(torch.bfloat16)
    names = [*module.state_dict()]
    assert keep_expanded([module], True) == 2 * 128 * 48
    kept = read_weight(module)
    for one, other in zip(
        before, (kept.matmul(x), kept.matmul_t(dy), kept.dense(torch.bfloat16)), strict=True
    ):
        assert torch.equal(one, other)
    assert kept.storage == weight.storage and [*module.state_dict()] == names
    if not in_fp8:
        assert kept.dense(torch.bfloat16).data_ptr() == kept.dense(torch.bfloat16).data_ptr()
    assert keep_expanded([module], False) == 0
    assert torch.equal(read_weight(module).matmul(x), before[0])


def test_expanded_weights_with_the_same_input_lie_side_by_side():
    bnb = pytest.importorskip("bitsandbytes")
    modules = [
        bnb.nn.Linear4bit(64, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
        for rows in (48, 16, 16)
    ]
    dense = [read_weight(module).dense(torch.bfloat16) for module in modules]
    assert stacked([read_weight(module) for module in modules]) is None
    assert keep_expanded(modules, True) == 2 * 64 * 80
    weights = [read_weight(module) for module in modules]
    whole = stacked(weights)
    assert whole is not None and torch.equal(whole.dense(torch.bfloat16), torch.cat(dense))
    assert stacked(weights[1:]) is not None and stacked([weights[0], weights[2]]) is None
    assert stacked(weights, answering=True) is None  # answers read the 4 bits
    keep_expanded(modules, False)
    assert stacked([read_weight(module) for module in modules]) is None
