"""e4m3 rows, transposes, 4-bit weights as codes, and the kernels that quantise what they produce."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.fp8 import (
    E4M3,
    dequantise,
    exponents_of,
    four_bit_row_scales,
    four_bit_to_fp8,
    glu_forward_fp8,
    power_of_two_scales,
    product,
    quantise_joined,
    quantise_rows,
    quantise_tensor,
    quantise_transposed,
    quantise_weight,
    row_scales,
    transpose_codes,
)
from pronghorn.kernels.glu import glu_forward
from pronghorn.kernels.nf4 import FourBits
from pronghorn.kernels.rms_norm import (
    rms_norm_backward,
    rms_norm_backward_fp8,
    rms_norm_forward,
    rms_norm_forward_fp8,
)
from tests.kernels.compare import DTYPES, IMPLS, INTERPRETED, four_bits, random

SHAPES = [(1, 16), (5, 96), (7, 130), (3, 1024)]


def assert_codes_hold(codes, scales, exact, impl="torch") -> None:
    """Every code is the e4m3 number nearest to exact / scale: off by at most half its last place, which is 1/16 of
    a number of three mantissa bits, or 2⁻¹⁰ scales below the smallest normal one. 1 % covers fp32's own division."""
    wide, unit = exact.double().cpu(), scales.double().cpu()
    interpreted = impl == "triton" and INTERPRETED
    bound = 1.01 * torch.maximum(wide.abs() / 16, unit * (2**-9 if interpreted else 2**-10))
    off = (codes.float().double().cpu() * unit - wide).abs()
    if interpreted:
        # Triton's interpreter cuts the smallest numbers, and forgets the carry where rounding reaches a power of two.
        mantissa, _ = torch.frexp((wide / unit).to(E4M3).float())
        off = torch.where(mantissa.abs() == 0.5, 0.0, off)
    assert not off.isnan().any()
    assert (off <= bound).all(), f"off by {(off / bound).max():.2f} times the bound"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_columns", [False, True])
def test_rows(impl, dtype, shape, with_columns, device):
    x = random(shape[0], shape[1] + 24, dtype=dtype, device=device)[:, 8 : 8 + shape[1]]
    columns = None
    exact = x.double()
    if with_columns:
        columns = torch.ldexp(torch.ones(shape[1], 1), torch.arange(shape[1])[:, None] % 9 - 4).to(device)
        exact = exact * columns.double().view(-1)
    codes, scales = quantise_rows(x, columns, impl=impl)
    assert codes.dtype == E4M3 and codes.is_contiguous() and scales.shape == (shape[0], 1)
    filled = exact.abs().amax(1, keepdim=True) / scales / 448
    assert (torch.frexp(scales)[0] == 0.5).all() and ((filled <= 1) & (filled > 0.5)).all()
    assert_codes_hold(codes, scales, exact, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("widths", [(48,), (130, 16), (1500, 33, 5), (8, 8, 8, 8)])
@pytest.mark.parametrize("with_columns", [False, True])
def test_known_maxima_and_exponents_give_the_same_codes(impl, widths, with_columns, device):
    parts = [
        random(11, w + 3, dtype=torch.bfloat16, device=device, seed=i)[:, :w] for i, w in enumerate(widths)
    ]
    exponents = (torch.arange(sum(widths), device=device) % 9 - 4).to(torch.int8) if with_columns else None
    columns = None if exponents is None else torch.ldexp(torch.ones(sum(widths), device=device), exponents)
    exact = torch.cat(parts, 1).float() * (1 if columns is None else columns)
    expected = quantise_rows(torch.cat(parts, 1), columns, impl=impl)
    for factors in (columns, exponents):
        for row_max in (None, exact.abs().amax(1)):
            found = quantise_joined(parts, factors, row_max=row_max, impl=impl)
            assert torch.equal(found[1], expected[1]) and torch.equal(found[0].float(), expected[0].float())
    # A maximum that is too large only makes the scale so.
    codes, scales = quantise_joined(parts, columns, row_max=2 * exact.abs().amax(1), impl=impl)
    assert torch.equal(scales, 2 * expected[1])
    assert_codes_hold(codes, scales, exact, impl)


def test_scales_of_rows_and_their_exponents():
    largest = torch.tensor([448.0, 448.1, 1.0, 3.5, 3.6, 0.0])
    assert row_scales(largest).view(-1)[:5].tolist() == [1.0, 2.0, 2**-8, 2**-7, 2**-6]
    assert torch.equal(row_scales(largest), power_of_two_scales(largest.view(-1, 1)))
    scales = torch.ldexp(torch.ones(200), torch.arange(200) - 100)
    assert exponents_of(scales).tolist() == list(range(-100, 100))


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_zeros_and_tiny_numbers_and_no_rows(impl, device):
    x = torch.zeros(3, 32, device=device)
    x[1] = 2.0**-120
    x[2, 3] = -5.0
    codes, scales = quantise_rows(x, impl=impl)
    assert (codes[:2].float() == 0).all() and scales.isfinite().all()
    assert codes[2, 3].float() * scales[2] == -5.0
    assert quantise_rows(x[:0], impl=impl)[0].shape == (0, 32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("widths", [(48,), (130, 16), (96, 33, 5), (8, 8, 8, 8)])
@pytest.mark.parametrize("with_columns", [False, True])
def test_parts_side_by_side(impl, widths, with_columns, device):
    parts = [
        random(5, w + 3, dtype=torch.bfloat16, device=device, seed=i)[:, :w] for i, w in enumerate(widths)
    ]
    columns = torch.rand(sum(widths), 1, device=device) if with_columns else None
    codes, scales = quantise_joined(parts, columns, impl=impl)
    expected, expected_scales = quantise_rows(torch.cat(parts, 1), columns, impl=impl)
    assert torch.equal(scales, expected_scales) and torch.equal(codes.float(), expected.float())


def test_a_number_that_is_none_stays_visible(device):
    for bad in (float("nan"), float("inf")):
        x = torch.ones(2, 32, device=device)
        x[0, 5] = bad
        rows = quantise_rows(x, impl="torch")
        y = product(rows, *quantise_weight(torch.ones(16, 32, device=device)), torch.float32, emulate=True)
        assert not y[0].isfinite().any() and y[1].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_one_scale_for_all_rows(impl, device):
    x = random(9, 60, dtype=torch.bfloat16, device=device)[:, :48]
    codes, scale = quantise_tensor(x, impl=impl)
    assert scale.shape == (1, 1) and scale == x.abs().max().float() / 448
    assert_codes_hold(codes, scale, x, impl)
    assert quantise_tensor(x[:0], impl=impl)[0].shape == (0, 48)


@pytest.mark.parametrize("rowwise", [True, False])
def test_a_weight_is_its_own_bf16_copy(rowwise, device):
    """Scales are powers of two, so the stored values are bf16 numbers, and quantising those again changes nothing."""
    weight = random(48, 80, dtype=torch.bfloat16, device=device, scale=0.02)
    weight[3] *= 100
    codes, scales = quantise_weight(weight, rowwise=rowwise)
    assert scales.shape == ((48, 1) if rowwise else (1, 1))
    assert (torch.frexp(scales)[0] == 0.5).all()
    assert_codes_hold(codes, scales.expand(48, 1), weight)
    stored = dequantise(codes, scales, torch.bfloat16)
    assert torch.equal(stored.float(), dequantise(codes, scales, torch.float32))
    again, same = quantise_weight(stored, rowwise=rowwise)
    assert torch.equal(dequantise(again, same, torch.float32), stored.float())


def test_scales_are_the_least_powers_of_two():
    largest = torch.tensor([448.0, 449.0, 1.0, 3.5, 3.6, 0.0])
    assert power_of_two_scales(largest)[:5].tolist() == [1.0, 2.0, 2**-8, 2**-7, 2**-6]
    assert power_of_two_scales(largest)[5].isfinite()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(16, 32), (130, 257), (1, 128), (300, 16)])
def test_transpose(impl, shape, device):
    codes = random(*shape, dtype=torch.float32, device=device).to(E4M3)
    turned = transpose_codes(codes, impl=impl)
    assert turned.shape == shape[::-1] and turned.is_contiguous()
    assert torch.equal(turned.view(torch.uint8), codes.view(torch.uint8).t())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rowwise", [True, False])
@pytest.mark.parametrize("shape", [(16, 32), (130, 257)])
def test_transposed_codes_of_a_dense_weight(impl, dtype, rowwise, shape, device):
    weight = random(*shape, dtype=dtype, device=device)
    codes, scales = quantise_weight(weight, rowwise=rowwise)
    turned = quantise_transposed(weight, scales, impl=impl)
    assert turned.is_contiguous() and turned.shape == shape[::-1]
    assert_codes_hold(turned.t(), scales, weight, impl)
    assert impl == "triton" or torch.equal(turned.float().t(), codes.float())
    grown = quantise_transposed(weight * 8, scales, impl=impl).float()
    assert not grown.isnan().any() and grown.abs().max() == 448


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape,blocksize", [((16, 64), 64), ((24, 256), 128), ((130, 192), 64)])
def test_four_bit_weights_as_codes(impl, double, transposed, shape, blocksize, device):
    bnb = pytest.importorskip("bitsandbytes.functional")
    weight = random(*shape, dtype=torch.float32, device=device, scale=0.02)
    bits, state, _ = four_bits(weight, blocksize, double=double)
    expected = bnb.dequantize_4bit(bits.packed, state)
    scales = four_bit_row_scales(bits)
    assert scales is not None and (expected.abs().amax(1, keepdim=True) <= 448 * scales).all()
    codes = four_bit_to_fp8(bits, scales, transposed=transposed, impl=impl)
    assert codes.is_contiguous() and codes.shape == (shape[::-1] if transposed else shape)
    assert_codes_hold(codes.t() if transposed else codes, scales, expected, impl)


def test_four_bit_rows_that_share_a_block_are_refused():
    packed, code = torch.zeros(480, dtype=torch.uint8), torch.linspace(-1, 1, 16)
    assert four_bit_row_scales(FourBits(packed, torch.ones(15), code, 64, (16, 60))) is None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_norm_quantises_what_it_gives(impl, dtype, with_residual, device):
    x = random(5, 130, dtype=dtype, device=device)
    residual = random(5, 130, dtype=dtype, device=device, seed=1) if with_residual else None
    weight = random(130, dtype=dtype, device=device, seed=2)
    plain = rms_norm_forward(x, weight, 1e-5, residual=residual, impl=impl)
    *fused, (codes, scales) = rms_norm_forward_fp8(x, weight, 1e-5, residual=residual, impl=impl)
    for one, other in zip(plain, fused, strict=True):
        assert torch.equal(one, other)
    expected, expected_scales = quantise_rows(fused[0], impl=impl)
    assert torch.equal(scales, expected_scales) and torch.equal(codes.float(), expected.float())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("need_weight_grad", [False, True])
def test_the_norms_backward_quantises_what_it_gives(impl, dtype, need_weight_grad, device):
    x, dy, residual = (random(5, 130, dtype=dtype, device=device, seed=seed) for seed in range(3))
    weight = random(130, dtype=dtype, device=device, seed=3)
    columns = (torch.arange(130, device=device) % 7 - 3).to(torch.int8)
    options = {"eps": 1e-5, "residual_grad": residual, "need_weight_grad": need_weight_grad, "impl": impl}
    plain = rms_norm_backward(dy, x, weight, None, **options)
    *fused, (codes, scales) = rms_norm_backward_fp8(dy, x, weight, None, columns, **options)
    assert (plain[1] is None) is not need_weight_grad
    for one, other in zip(plain, fused, strict=True):
        # Two kernels: in fp32 a compiler may contract their products another way.
        assert one is None or torch.allclose(
            one, other, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-6
        )
    expected, expected_scales = quantise_rows(fused[0], columns, impl=impl)
    assert torch.equal(scales, expected_scales) and torch.equal(codes.float(), expected.float())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_glu_quantises_what_it_gives(impl, dtype, activation, device):
    both = random(5, 2 * 130, dtype=dtype, device=device)
    gate, up = both[:, :130], both[:, 130:]
    act, (codes, scales) = glu_forward_fp8(gate, up, activation, impl=impl)
    assert torch.equal(act, glu_forward(gate, up, activation, impl=impl))
    expected, expected_scales = quantise_rows(act, impl=impl)
    assert torch.equal(scales, expected_scales) and torch.equal(codes.float(), expected.float())
