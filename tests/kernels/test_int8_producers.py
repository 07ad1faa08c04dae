"""Kernels whose output goes on as int8 codes."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.int8 import (
    quantise_rows,
    rms_norm_backward_int8,
    rms_norm_forward_int8,
)
from pronghorn.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from tests.kernels.compare import IMPLS, assert_near, random

WIDTHS = [16, 96, 128, 1536, 4096]
HALF = (torch.bfloat16, torch.float32)


def assert_codes_of(codes, x, impl):
    expected = quantise_rows(x, rotated=True, impl=impl)
    assert (codes[0] == expected[0]).all() and (codes[1] == expected[1]).all()
    assert codes[0].shape == x.shape and codes[1].shape == (x.shape[0], 1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("with_residual, offset", [(False, 0.0), (True, 1.0)])
def test_norm_and_its_codes(impl, dtype, width, with_residual, offset, device):
    x = random(5, width + 16, dtype=dtype, device=device)[:, :width]
    weight = random(width, dtype=dtype, device=device, seed=1)
    residual = random(5, width, dtype=dtype, device=device, seed=2) if with_residual else None
    y, rstd, summed, codes = rms_norm_forward_int8(
        x, weight, 1e-5, residual=residual, weight_offset=offset, impl=impl
    )
    assert_near(summed, x.double() if residual is None else x.double() + residual.double())
    wanted = rms_norm_forward(summed, weight, 1e-5, weight_offset=offset, impl="torch")
    assert_near(rstd, wanted[1])
    assert_near(y, wanted[0].double(), slack=2.0)  # both are rounded
    assert_codes_of(codes, y, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("with_residual, with_rstd", [(False, True), (True, False)])
def test_the_norms_gradient_and_its_codes(impl, dtype, width, with_residual, with_rstd, device):
    x, dy = (random(5, width + 16, dtype=dtype, device=device, seed=s)[:, :width] for s in (0, 1))
    weight = random(width, dtype=dtype, device=device, seed=2)
    added = random(5, width, dtype=dtype, device=device, seed=3) if with_residual else None
    rstd = (x.float().square().mean(1) + 1e-5).rsqrt() if with_rstd else None
    dx, codes = rms_norm_backward_int8(dy, x, weight, rstd, eps=1e-5, residual_grad=added, impl=impl)
    wide = [None if t is None else t.double() for t in (dy, x, weight, added)]
    expected, _ = rms_norm_backward(
        wide[0], wide[1], wide[2], None, eps=1e-5, residual_grad=wide[3], impl="torch"
    )
    assert_near(dx, expected, slack=2.0)
    assert_codes_of(codes, dx, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_wide_rows_no_rows_and_widths_without_blocks(impl, device):
    x = random(1, 16448, dtype=torch.bfloat16, device=device)  # more than a program holds
    weight = torch.ones(16448, dtype=torch.bfloat16, device=device)
    y, _, _, codes = rms_norm_forward_int8(x, weight, 1e-6, impl=impl)
    assert_codes_of(codes, y, impl)
    assert rms_norm_forward_int8(x[:0, :64], weight[:64], 1e-6, impl=impl)[3][0].shape == (0, 64)
    dx, codes = rms_norm_backward_int8(y, x, weight, None, eps=1e-6, impl=impl)
    assert_codes_of(codes, dx, impl)
    with pytest.raises(ValueError, match="blocks"):
        rms_norm_forward_int8(x[:, :24], weight[:24], 1e-6, impl=impl)
