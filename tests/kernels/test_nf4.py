"""4-bit dequantisation against bitsandbytes, and against its format spelled out."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.nf4 import dequantize_4bit
from tests.kernels.compare import DTYPES, IMPLS, RELATIVE, four_bits, random

bnb = pytest.importorskip("bitsandbytes.functional")


def spelled_out(packed, state, shape) -> torch.Tensor:
    """The format, value by value, in Python floats."""
    code, scales = state.code.tolist(), state.absmax.tolist()
    if state.nested:
        fine, coarse, size = state.state2.code.tolist(), state.state2.absmax.tolist(), state.state2.blocksize
        scales = [fine[c] * coarse[i // size] + state.offset.item() for i, c in enumerate(scales)]
    nibbles = [n for byte in packed.view(-1).tolist() for n in (byte >> 4, byte & 15)]
    count = shape[0] * shape[1]
    values = [code[n] * scales[i // state.blocksize] for i, n in enumerate(nibbles[:count])]
    return torch.tensor(values, dtype=torch.float64).view(shape)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    "shape,blocksize", [((16, 64), 64), ((24, 96), 128), ((512, 100), 64), ((4, 256), 256)]
)
def test_equals_bitsandbytes(impl, dtype, kind, double, shape, blocksize, device):
    weight = random(*shape, dtype=dtype, device=device, scale=0.02)
    bits, state, _ = four_bits(weight, blocksize, kind, double)
    expected = spelled_out(bits.packed, state, shape).to(device)
    found = dequantize_4bit(bits, dtype, impl=impl)
    assert found.dtype == dtype and found.shape == weight.shape
    # code · scale is one fp32 multiplication (a nested scale: two more operations), then one rounding.
    assert ((found.double() - expected).abs() <= RELATIVE[dtype] * expected.abs() + 1e-12).all()
    if (
        device.type == "cuda" or shape[1] % blocksize == 0
    ):  # elsewhere bitsandbytes' CPU kernel is itself wrong
        theirs = bnb.dequantize_4bit(bits.packed, state).double()
        assert ((found.double() - theirs).abs() <= 2 * RELATIVE[dtype] * expected.abs() + 1e-12).all()
    # And it is the weight, up to the quantisation's own error.
    assert (found - weight).abs().mean() < 0.2 * weight.abs().mean()


@pytest.mark.parametrize("impl", IMPLS)
def test_writes_into_a_given_buffer(impl, device):
    weight = random(8, 64, dtype=torch.float32, device=device)
    bits, _, _ = four_bits(weight, double=False)
    out = torch.full((8, 64), float("nan"), dtype=torch.bfloat16, device=device)
    found = dequantize_4bit(bits, out.dtype, out=out, impl=impl)
    assert found.data_ptr() == out.data_ptr() and not out.isnan().any()
