"""int8 rows, and products of 8-bit codes with everything that is added to them."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.parametrize("way", [(1, 16, 16), (2, 32, 0), (16,)])
def test_ways_of_holding_rows_agree(way, device):
    """Rows in two pieces, several rows a program, rows read twice: the same codes."""
    from pronghorn.kernels.triton.int8 import Held, Long
    from pronghorn.kernels.triton.int8 import quantise_joined as run

    parts = [random(7, w, dtype=torch.bfloat16, device=device, seed=w) for w in (1024, 512, 256)]
    held = len(way) > 1
    way = Held(*way, warps=4, stages=2, per_processor=1) if held else Long(*way, warps=4, stages=2)
    alone, expected = run(parts[:1], None, True, way), quantise_rows(parts[0], rotated=True, impl="torch")
    assert (alone[0] != expected[0]).double().mean() < 1e-3
    parts[1][3, 5], parts[2][4, 200] = float("nan"), float("inf")
    codes, scales = run(parts, None, True, way)
    expected, expected_scales = quantise_joined(parts, rotated=True, impl="torch")
    assert (scales.isfinite().view(-1) == torch.tensor([1, 1, 1, 0, 0, 1, 1], device=device).bool()).all()
    finite = scales.isfinite().view(-1)
    torch.testing.assert_close(scales[finite], expected_scales[finite], rtol=1e-5, atol=0)
    assert (codes[finite].int() - expected[finite].int()).abs().max() <= 1
    assert (codes[finite] != expected[finite]).double().mean() < 1e-3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [True, False])
def test_dequantise(impl, dtype, rotated, device):
    wide, _ = quantise_rows(random(37, 160, dtype=torch.float32, device=device), impl="torch")
    codes, scales = wide[:, 32:], torch.rand(37, 1, device=device) + 0.1
    out = dequantise(codes, scales, dtype, rotated, impl=impl)
    expected = codes.double() * scales.double()
    expected = exactly_turned(expected) if rotated else expected
    assert out.dtype == dtype and out.is_contiguous()
    assert ((out.double() - expected).abs() <= expected.abs() * RELATIVE[dtype] + 1e-4).all()


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


def operands(m: int, n: int, k: int, device, spare: int = 0):
    """Codes and scales of both factors; with `spare`, rows of codes lie further apart."""
    out = []
    for rows, seed in ((m, 1), (n, 2)):
        codes, scales = quantise_rows(
            random(rows, k, dtype=torch.float32, device=device, seed=seed), impl="torch"
        )
        wide = torch.zeros(rows, k + spare, dtype=torch.int8, device=device)
        wide[:, spare:].copy_(codes)
        out.append((wide[:, spare:], scales))
    return out


def additions(m: int, n: int, rank: int, adds: bool, device, dtype=torch.bfloat16):
    low_rank = residual = None
    if rank:
        xa = random(m, rank + 8, dtype=dtype, device=device, seed=3)[:, :rank]
        low_rank = LowRank(xa, random(n, rank, dtype=dtype, device=device, seed=4), 0.75)
    if adds:
        residual = random(m, n + 8, dtype=dtype, device=device, seed=5)[:, :n]
    return low_rank, residual


def assert_product(out, left, right, low_rank, residual, dtype=torch.bfloat16):
    expected = (left[0].double() * left[1].double()) @ (right[0].double() * right[1].double()).t()
    # fp32's roundings are of the largest term, 2⁻²⁰ of |x| |W| at most.
    sums = (left[0].double().abs() * left[1].double()) @ (right[0].double().abs() * right[1].double()).t()
    if low_rank is not None:
        expected = low_rank.add_to(expected)
    expected = expected if residual is None else expected + residual.double()
    assert out.dtype == dtype and out.shape == expected.shape and not out.isnan().any()
    # A rank that no kernel takes along is added after a first rounding.
    roundings = 2 if low_rank is not None and low_rank.xa.shape[1] > 64 else 1
    size = expected.abs() if roundings == 1 else expected.abs().clamp(min=sums.abs() * 0.5)
    bound = size * RELATIVE[dtype] * roundings + sums * 2**-20 + 1e-5
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sizes", [(1, 16, 16), (130, 272, 144), (200, 528, 400), (65, 40, 100)])
@pytest.mark.parametrize("rank, adds", [(0, False), (8, True), (16, False), (40, True), (128, False)])
def test_product(impl, sizes, rank, adds, device):
    left, right = operands(*sizes, device, spare=16)
    low_rank, residual = additions(*sizes[:2], rank, adds, device)
    out = product(left, right, low_rank=low_rank, residual=residual, impl=impl)
    assert_product(out, left, right, low_rank, residual)


@pytest.mark.parametrize("impl", IMPLS)
def test_product_into_what_is_added(impl, device):
    left, right = operands(70, 48, 96, device)
    low_rank, residual = additions(70, 48, 4, True, device)
    out = residual.clone()
    wide = torch.zeros(70, 64, dtype=torch.bfloat16, device=device)[:, :48].copy_(residual)
    for into in (out, wide):
        assert product(left, right, low_rank=low_rank, residual=into, out=into, impl=impl) is into
        assert_product(into, left, right, low_rank, residual)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="Hopper's own kernel is not interpreted",
)
@pytest.mark.parametrize("sizes", [(65, 48, 80), (1000, 784, 1040), (4096, 1024, 128), (300, 4096, 2048)])
@pytest.mark.parametrize(
    "rank, adds, dtype",
    [
        (0, False, torch.bfloat16),
        (12, True, torch.bfloat16),
        (48, False, torch.bfloat16),
        (64, False, torch.bfloat16),
        (0, True, torch.bfloat16),
        (16, False, torch.float16),
    ],
)
def test_hoppers_kernel(sizes, rank, adds, dtype, device):
    """Ragged shapes, one stage of codes or many, several tiles a program, operands that are columns of wider ones."""
    from pronghorn.kernels.triton.gemm8 import Call, why_not_hopper
    from pronghorn.kernels.triton.gemm8_hopper import run

    assert why_not_hopper(device.index or 0) is None
    m, n, k = sizes
    left, right = operands(m, n, k, device, spare=32)
    low_rank, residual = additions(m, n, rank, adds, device, dtype)
    wide = torch.empty(m, n + 16, dtype=dtype, device=device)
    xa = None if low_rank is None else torch.nn.functional.pad(low_rank.xa, (0, 4))[:, :rank].contiguous()
    b = None if low_rank is None else low_rank.b
    if rank == 12:  # rows of 24 bytes are not what TMA takes
        xa, b = (torch.nn.functional.pad(t, (0, 4))[:, :rank] for t in (xa, b))
    call = Call(left[0], right[0], wide[:, :n], left[1], right[1], xa, b, 0.75, residual)
    assert call.why_not_tiles() is None
    run(call)
    assert_product(wide[:, :n], left, right, low_rank, residual, dtype)
    assert wide[:, n:].isnan().all()  # nothing beyond the end
    out = product(left, right, low_rank=low_rank, residual=residual, dtype=dtype)
    assert (out == wide[:, :n]).all()


def test_why_a_kernel_is_not_taken(device):
    from pronghorn.kernels.triton.gemm8 import Call, why_not_hopper

    left, right = operands(70, 48, 96, device)
    out = torch.empty(70, 48, dtype=torch.bfloat16, device=device)
    call = Call(left[0], right[0], out, left[1], right[1], None, None, 1.0, None)
    assert call.why_not_tiles() is None and call.rank == 0
    assert "16 bytes" in call._replace(left=left[0][:, 8:]).why_not_tiles()
    assert "dtype" in call._replace(residual=out.float()).why_not_tiles()
    if device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        assert "Hopper" in why_not_hopper(device.index or 0)


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
    left, right = operands(3, 32, 64, device)
    assert product((left[0][:0], left[1][:0]), right, impl=impl).shape == (0, 32)


@pytest.mark.parametrize("staged", [2, 4, 6, 8], ids=["bf16", "fp32", "bf16 and factors", "fp32 and factors"])
def test_rows_that_are_held_fit_into_shared_memory(staged: int) -> None:
    """Of all stages together, on Hopper (227 KiB) and Ada (99 KiB)."""
    from pronghorn.kernels.triton.int8 import Held, way_of

    for shared in (232_448, 101_376):
        for blocks in range(8, 600, 8):
            way = way_of(blocks, 64, staged, shared)
            if isinstance(way, Held) and way.stages > 1:
                assert way.stages * way.rows * (way.main + way.rest) * 64 * staged <= shared
