"""int8 rows, and products of 8-bit codes with everything that is added to them."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels import fp8
from pronghorn.kernels.int8 import (
    dequantise,
    hadamard,
    product,
    quantise_joined,
    quantise_rows,
    quantise_weight,
    quantise_weight_input_grad,
    rotate,
    rotation_of,
)
from pronghorn.kernels.lora import LowRank
from tests.kernels.compare import DTYPES, IMPLS, RELATIVE, random

SHAPES = [(1, 16), (5, 96), (7, 130), (3, 1024)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_columns", [False, True])
def test_a_code_is_the_nearest_one(impl, dtype, shape, with_columns, device):
    x = random(shape[0], shape[1] + 24, dtype=dtype, device=device)[:, 8 : 8 + shape[1]]
    exact, columns = x.double(), None
    if with_columns:
        columns = (torch.rand(shape[1], 1) + 0.5).to(device)
        exact = exact * columns.double().view(-1)
    codes, scales = quantise_rows(x, columns, impl=impl)
    assert codes.dtype == torch.int8 and codes.is_contiguous() and scales.shape == (shape[0], 1)
    torch.testing.assert_close(scales.double(), exact.abs().amax(1, keepdim=True) / 127, rtol=1e-6, atol=0)
    assert codes.abs().max() == 127 and codes.min() >= -127
    off = (codes.double() * scales.double() - exact).abs() / scales.double()
    assert off.max() <= 0.5 + 1e-4  # fp32's own division and product


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_zeros_of_no_numbers_and_no_rows(impl, device):
    x = torch.zeros(4, 32, device=device)
    x[1, 3] = -5.0
    x[2, 5], x[3, 6] = float("nan"), float("-inf")
    codes, scales = quantise_rows(x, impl=impl)
    assert (codes[0] == 0).all() and scales[:2].isfinite().all() and codes[1, 3] * scales[1] == -5.0
    assert not scales[2:].isfinite().any()
    assert quantise_rows(x[:0], impl=impl)[0].shape == (0, 32)


def exactly_turned(x):
    size = rotation_of(x.shape[-1])
    turn = hadamard(size, x.device, torch.float64) / size**0.5
    return (x.double().view(-1, size) @ turn).view(x.shape)


def test_the_turn_is_its_own_inverse_and_keeps_lengths():
    assert [rotation_of(width) for width in (0, 8, 16, 24, 96, 1536, 28672)] == [0, 0, 16, 0, 32, 64, 64]
    for size in (16, 32, 64):
        matrix = hadamard(size, torch.device("cpu"))
        assert (matrix == matrix.t()).all() and (matrix @ matrix == size * torch.eye(size)).all()
    with pytest.raises(ValueError, match="blocks"):
        rotate(torch.zeros(2, 24))
    with pytest.raises(ValueError, match="blocks"):
        quantise_rows(torch.zeros(2, 24), rotated=True)
    with pytest.raises(ValueError, match="columns"):
        quantise_rows(torch.zeros(2, 32), torch.ones(32), rotated=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 16), (5, 96), (2, 3, 128), (1, 4160)])
def test_rotate(impl, dtype, shape, device):
    x = random(*shape, dtype=dtype, device=device)
    out = rotate(x, impl=impl)
    expected = exactly_turned(x)
    assert out.dtype == dtype and out.shape == x.shape
    bound = expected.abs() * RELATIVE[dtype] + x.abs().amax().double() * 2**-18
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "widths", [(64,), (1536,), (96,), (16, 32, 96), (1088, 128, 128), (24, 8), (16, 16, 16, 80)]
)
def test_turned_codes_of_rows_side_by_side(impl, dtype, widths, device):
    """One scale for a row of all parts, whose blocks are those of the joined width."""
    parts = [random(5, w + 8, dtype=dtype, device=device, seed=w)[:, :w] for w in widths]
    parts[0][2] *= 30
    codes, scales = quantise_joined(parts, rotated=True, impl=impl)
    exact = exactly_turned(torch.cat(parts, 1))
    assert codes.shape == exact.shape and codes.is_contiguous()
    torch.testing.assert_close(scales.double(), exact.abs().amax(1, keepdim=True) / 127, rtol=1e-5, atol=0)
    off = (codes.double() * scales.double() - exact).abs() / scales.double()
    assert off.max() <= 0.5 + 1e-3
    plain, plain_scales = quantise_joined(parts, impl=impl)
    joined = quantise_rows(torch.cat(parts, 1), impl=impl)
    assert (plain == joined[0]).all() and (plain_scales == joined[1]).all()


@pytest.mark.parametrize("way", [(1, 16, 16), (2, 32, 0), 16])
def test_ways_of_holding_rows_agree(way, device):
    """Rows in two pieces, several rows a program, rows read twice: the same codes."""
    from pronghorn.kernels.triton.int8 import Held
    from pronghorn.kernels.triton.int8 import quantise_joined as run

    parts = [random(7, w, dtype=torch.bfloat16, device=device, seed=w) for w in (1024, 512, 256)]
    parts[1][3, 5], parts[2][4, 200] = float("nan"), float("inf")
    if isinstance(way, tuple):
        way = Held(*way, warps=4, stages=2, per_processor=1)
    codes, scales = run(parts, None, True, way)
    expected, expected_scales = quantise_joined(parts, rotated=True, impl="torch")
    assert (scales.isfinite().view(-1) == torch.tensor([1, 1, 1, 0, 0, 1, 1], device=device).bool()).all()
    finite = scales.isfinite().view(-1)
    torch.testing.assert_close(scales[finite], expected_scales[finite], rtol=1e-5, atol=0)
    assert (codes[finite].int() - expected[finite].int()).abs().max() <= 1
    assert (codes[finite] != expected[finite]).double().mean() < 1e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_products_of_turned_codes_are_those_of_what_was_turned(impl, device):
    """Forward and input gradient of two weights beside each other, next to fp64; the error is that of 8 bits."""
    x, outlier = random(70, 192, dtype=torch.bfloat16, device=device), 3
    x[:, outlier] *= 100  # a column that would take all of the scale
    weights = [random(n, 192, dtype=torch.bfloat16, device=device, seed=n) for n in (128, 64)]
    weight = torch.cat(weights).double()
    out = product(
        quantise_rows(x, rotated=True, impl=impl), quantise_weight(weights[0], impl=impl), impl=impl
    )
    expected = x.double() @ weight[:128].t()
    assert (out.double() - expected).norm() <= 0.02 * expected.norm()
    dy = [random(70, n, dtype=torch.bfloat16, device=device, seed=n) for n in (128, 64)]
    right = quantise_weight_input_grad(weights, impl=impl)
    assert right[0].shape == (192, 192) and right[1].shape == (192, 1)
    dx = product(quantise_joined(dy, rotated=True, impl=impl), right, impl=impl)
    expected = torch.cat(dy, 1).double() @ weight
    assert (dx.double() - expected).norm() <= 0.015 * expected.norm()
    # A half of a scale each, and the turn spreads them.
    back = dequantise(*right, torch.float32)
    assert (back.double() - weight.t()).norm() <= 0.01 * weight.norm()
    stored = dequantise(*quantise_weight(weights[0], impl=impl), torch.bfloat16)
    assert (stored.double() - weight[:128]).norm() <= 0.01 * weight[:128].norm()


def operands(kind: str, m: int, n: int, k: int, device, spare: int = 0):
    """Codes and scales of both factors; with `spare`, the left one's rows lie further apart."""
    quantise = quantise_rows if kind == "int8" else fp8.quantise_rows
    left, scales = quantise(random(m, k, dtype=torch.float32, device=device, seed=1), impl="torch")
    if spare:
        wide = torch.zeros(m, k + spare, dtype=torch.int8, device=device).view(left.dtype)
        wide[:, :k].copy_(left)
        left = wide[:, :k]
    return (left, scales), quantise(random(n, k, dtype=torch.float32, device=device, seed=2), impl="torch")


def exact_product(left, right, low_rank, residual):
    out = (left[0].double() * left[1].double()) @ (right[0].double() * right[1].double()).t()
    if low_rank is not None:
        out = low_rank.add_to(out)
    return out if residual is None else out + residual.double()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["int8", "e4m3"])
@pytest.mark.parametrize("sizes", [(1, 16, 16), (130, 272, 144), (200, 528, 400), (65, 40, 100)])
@pytest.mark.parametrize("rank, adds", [(0, False), (8, True), (16, False), (40, True), (128, False)])
def test_product(impl, kind, sizes, rank, adds, device):
    m, n, k = sizes
    left, right = operands(kind, m, n, k, device, spare=16)
    low_rank = residual = None
    if rank:
        xa = random(m, rank + 8, dtype=torch.bfloat16, device=device, seed=3)[:, :rank]
        low_rank = LowRank(xa, random(n, rank, dtype=torch.bfloat16, device=device, seed=4), 0.75)
    if adds:
        residual = random(m, n + 8, dtype=torch.bfloat16, device=device, seed=5)[:, :n]
    out = product(left, right, low_rank=low_rank, residual=residual, impl=impl)
    expected = exact_product(left, right, low_rank, residual)
    assert out.dtype == torch.bfloat16 and out.shape == (m, n) and not out.isnan().any()
    # bf16 rounds to 2⁻⁹ of the result; fp32's roundings are of the largest term. The matrix units add e4m3 products
    # in 14 bits: 2⁻¹³ of the largest partial sum, which stays below |x| |W|.
    sums = (left[0].double().abs() * left[1].double()) @ (right[0].double().abs() * right[1].double()).t()
    loose = 2**-13 if kind == "e4m3" and out.is_cuda and impl == "triton" else 2**-20
    bound = expected.abs() * RELATIVE[torch.bfloat16] + sums * loose + 1e-5
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("kind", ["int8", "e4m3"])
@pytest.mark.parametrize("rank, adds", [(0, False), (16, True), (40, False)])
def test_product_that_copies_tiles(kind, rank, adds, device):
    """The kernel of GPUs with TMA; interpreted elsewhere."""
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no TMA")
    from pronghorn.kernels.triton.gemm8 import Call, by_tma

    m, n, k = 200, 528, 144
    left, right = operands(kind, m, n, k, device)
    low_rank = residual = None
    if rank:
        factors = (random(rows, rank, dtype=torch.bfloat16, device=device, seed=rows) for rows in (m, n))
        low_rank = LowRank(*factors, 0.5)
    if adds:
        residual = random(m, n, dtype=torch.bfloat16, device=device, seed=5)
    xa, b, scaling = low_rank or (None, None, 1.0)
    out = torch.empty(m, n, dtype=torch.bfloat16, device=device)
    by_tma(Call(left[0], right[0], out, left[1], right[1], xa, b, scaling, residual), rows=64, columns=128)
    expected = exact_product(left, right, low_rank, residual)
    assert ((out.double() - expected).abs() <= expected.abs() * RELATIVE[torch.bfloat16] + 0.02).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_integers_add_up_exactly(impl, device):
    """Sums beyond 2²⁴, where fp32 would begin to drop ones: the result differs from a neighbour's by one."""
    k = 2048
    left = torch.full((16, k), 127, dtype=torch.int8, device=device)
    right = torch.full((16, k), 127, dtype=torch.int8, device=device)
    right[1, 0] = 126
    ones = torch.ones(16, 1, device=device)
    # A residual takes off nearly all, so that bf16 holds what is left.
    low = torch.full((16, 16), -float(127 * 127 * k), dtype=torch.bfloat16, device=device)
    out = product((left, ones), (right, ones), residual=low, impl=impl).double()
    assert (
        out[:, 0] - out[:, 1]
    ).abs().max() <= 128 + 127  # spacing of bf16 near the rest, and the difference
    assert (
        product((left, ones), (right, ones), impl=impl)[0, 0]
        == torch.tensor(127.0 * 127 * k).bfloat16().item()
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl, device):
    left, right = operands("int8", 3, 32, 64, device)
    assert product((left[0][:0], left[1][:0]), right, impl=impl).shape == (0, 32)
