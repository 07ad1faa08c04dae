"""4-bit weights times a few rows: norm, bias, activation, residual, columns in parts; against the formula in fp64."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.matvec import FourBit, RowNorm, fits_few_rows, matvec_4bit
from tests.kernels.compare import INTERPRETED, four_bits, random
from tests.kernels.test_matvec import finished, normed

#: of the numbers of a code, of x and of the result, each rounded to bf16 (the interpreter cuts instead)
BF16 = 2**-8 if INTERPRETED else 2**-9


def parts_of(widths, columns, double, device):
    made = [
        four_bits(random(n, columns, dtype=torch.float32, device=device, seed=i, scale=0.05), double=double)
        for i, n in enumerate(widths)
    ]
    parts = [FourBit(bits, tuple(bits.code.tolist())) for bits, _, _ in made]
    return parts, torch.cat([dense for _, _, dense in made])


def assert_near_sums(found, expected, terms):
    """Roundings of every product's factors, which are as likely up as down, and of the result."""
    bound = 3 * BF16 * expected.abs() + 2 * BF16 * terms
    difference = (found.double() - expected).abs()
    assert not found.isnan().any(), "NaN: memory that nobody wrote, or a wrong formula"
    assert (difference <= bound).all(), f"off by {(difference / bound).max():.2f} times the bound"


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    "widths,columns,rows,activation",
    [
        ((64,), 2304, 3, None),
        ((64,), 256, 12, None),
        ((128, 64, 64), 256, 20, None),
        ((64, 64), 768, 5, "silu"),
        ((64, 64), 256, 33, "silu"),
    ],
)
def test_few_rows(widths, columns, rows, activation, double, device):
    pytest.importorskip("bitsandbytes")
    parts, weight = parts_of(widths, columns, double, device)
    x = random(rows, columns, dtype=torch.bfloat16, device=device)
    assert fits_few_rows(x, parts)
    norm = RowNorm(random(columns, dtype=torch.bfloat16, device=device, seed=1), 1e-5, 1.0)
    bias = random(sum(widths), dtype=torch.bfloat16, device=device, seed=2)
    exact = normed(x, norm)
    expected = finished(exact @ weight.t() + bias.double(), None, activation, None)
    terms = exact.abs() @ weight.abs().t() + bias.double().abs()
    if activation is not None:
        gate, up = terms.chunk(2, 1)
        terms = gate * up
    found = [matvec_4bit(x, parts, norm=norm, bias=bias, activation=activation, impl="triton") for _ in "12"]
    assert_near_sums(found[0], expected, terms)
    assert torch.equal(*found), "sums of parts depend on who comes last, or counters are left behind"


def test_added_to_a_residual(device):
    pytest.importorskip("bitsandbytes")
    parts, weight = parts_of((64,), 512, True, device)
    x, residual = (random(5, n, dtype=torch.bfloat16, device=device, seed=i) for i, n in enumerate((512, 64)))
    out = residual.clone()
    found = matvec_4bit(x, parts, residual=out, impl="triton")
    assert found.data_ptr() == out.data_ptr()
    terms = x.double().abs() @ weight.abs().t()
    assert_near_sums(found, x.double() @ weight.t() + residual.double(), terms + residual.double().abs())


def test_what_does_not_fit(device):
    pytest.importorskip("bitsandbytes")
    parts, _ = parts_of((64,), 256, True, device)
    x = torch.zeros(65, 256, dtype=torch.bfloat16, device=device)
    assert fits_few_rows(x[:1], parts) and fits_few_rows(x[:64], parts)
    assert (
        not fits_few_rows(x, parts)
        and not fits_few_rows(x[:8], ())
        and not fits_few_rows(x[:8].half(), parts)
    )
    for widths, columns in (((72,), 256), ((64,), 192)):
        assert not fits_few_rows(x[:8], parts_of(widths, columns, True, device)[0])
