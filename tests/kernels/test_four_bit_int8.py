"""int8 codes straight out of 4 bits, against the dequantised weight quantised."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.four_bit_int8 import four_bit_to_int8
from pronghorn.kernels.int8 import quantise_joined, quantise_rows
from tests.kernels.compare import IMPLS, four_bits, random

pytest.importorskip("bitsandbytes")


def off(codes, expected):
    """By how many steps the worst code is off, and the share of codes that are."""
    difference = (codes.int() - expected.int()).abs()
    return difference.max().item(), (difference > 0).float().mean().item()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind, double", [("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize(
    "shape, blocksize", [((16, 64), 64), ((48, 80), 64), ((96, 192), 128), ((192, 320), 64)]
)
def test_both_directions(impl, kind, double, shape, blocksize, device):
    weight = random(*shape, dtype=torch.float32, device=device, scale=0.02)
    weight[3, 5] = 0.9  # turned, it stands in every number of its block
    bits, _, dense = four_bits(weight, blocksize, kind, double)
    dense = dense.float()
    for input_grad, rows in ((False, dense), (True, dense.t().contiguous())):
        expected, scales = quantise_rows(rows, rotated=True, impl="torch")
        codes = four_bit_to_int8(bits, scales, input_grad=input_grad, impl=impl)
        assert codes.dtype == torch.int8 and codes.shape == rows.shape
        # Numbers of the code have 12 bits on a GPU, so that one in a hundred falls to the neighbour.
        worst, share = off(codes, expected)
        assert worst <= 1 and share <= (0.02 if device.type == "cuda" else 0.002)


@pytest.mark.parametrize("impl", IMPLS)
def test_parts_of_a_group(impl, device):
    """Weights one below the other: columns of one matrix in the input gradient, turned in the group's blocks."""
    parts = [
        four_bits(random(rows, 128, dtype=torch.float32, device=device, scale=0.02)) for rows in (128, 64, 64)
    ]
    expected, scales = quantise_joined(
        [dense.float().t() for _, _, dense in parts], rotated=True, impl="torch"
    )
    codes = torch.empty(128, 256, dtype=torch.int8, device=device)
    for (bits, _, _), out in zip(parts, codes.split([128, 64, 64], 1), strict=True):
        found = four_bit_to_int8(bits, scales, input_grad=True, block=64, out=out, impl=impl)
        assert found.data_ptr() == out.data_ptr()
    assert off(codes, expected)[0] <= 1 and off(codes, expected)[1] < 0.02


@pytest.mark.parametrize("impl", IMPLS)
def test_zeros_and_sizes_that_do_not_fit(impl, device):
    bits, _, dense = four_bits(torch.zeros(16, 64, device=device))
    _, scales = quantise_rows(dense.float(), rotated=True)
    assert not four_bit_to_int8(bits, scales, impl=impl).any()
    with pytest.raises(ValueError, match="blocks of 32"):
        four_bit_to_int8(bits, scales, input_grad=True, block=32, impl=impl)
