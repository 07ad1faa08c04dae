"""How far 8-bit products are from those of the unquantised factors, and from exact sums of the quantised ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.kernels import fp8, int8
from pronghorn.weights import Fp8Linear, Int8Linear, Int8Weight, read_weight

#: Rounding to e4m3 is off by 2.5 % rms (tests/weights/test_fp8.py), two factors by 3.5 %; outliers may add a little.
#: Int8 rows, turned, hold numbers of the normal distribution with their largest at 4 to 6 deviations: off by
#: 5/127/√12 = 1.1 % each, 1.6 % together. With one copy of the codes output gradients are not turned: how far rounding
#: puts them off then lies in their outliers, and `rounding_error` says it for the rows at hand.
PRODUCT_ERROR = {"fp8": 0.045, "int8": 0.025}
#: Of an error that was computed from the rows: what the weights' rounding adds, and chance.
ROUNDING_SLACK = 1.1
#: The result's rounding to bf16 is 2^-9 at most; fast accumulation keeps about 14 bits of the running sum.
UNIT_ERROR = 5e-3
#: Rows that are compared.
COMPARED = 128


def product_errors(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, copies: int = 2
) -> tuple[list[float], list[float], list[float]]:
    """(against fp64 of the unquantised factors, against the quantised ones, bounds of the first), forward and input
    gradient each.

    Args:
        kind: "fp8" or "int8". shape: (rows, in, out).
        copies: of int8 codes.
    """
    tokens, width, out = shape
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(width, out, bias=False, dtype=dtype).requires_grad_(False)
    linear.weight.copy_(torch.randn(out, width, generator=generator) / width**0.5)
    linear = linear.to(device)
    weight = read_weight(Int8Linear.of(linear, copies=copies) if kind == "int8" else Fp8Linear.of(linear))
    assert weight is not None
    dense = linear.weight.double()
    errors, unit, bounds = [], [], []
    for forward, run, exact in ((True, weight.matmul, dense.t()), (False, weight.matmul_t, dense)):
        inner = width if forward else out
        # Some columns of activations are larger than others by an order of magnitude.
        x = torch.randn(tokens, inner, generator=generator) * torch.exp(
            torch.randn(inner, generator=generator)
        )
        x = x.to(device, dtype)
        found, some = run(x)[:COMPARED].double(), x[:COMPARED]
        errors.append(_error(found, some.double() @ exact))
        unit.append(_error(found, _of_codes(weight, some, forward)))
        turned = forward or not isinstance(weight, Int8Weight) or weight.back is not None
        rounding = 0.0 if turned else ROUNDING_SLACK * rounding_error(some * weight.scales.view(-1))
        bounds.append(max(PRODUCT_ERROR[kind], rounding))
    return errors, unit, bounds


def rounding_error(rows: Tensor) -> float:
    """What rounding rows to 255 steps of their largest number adds, relative: rms(step / √12) over rms(rows)."""
    rows = rows.double()
    steps = rows.abs().amax(1) / 127
    return (steps.square().mean() / 12 / rows.square().mean()).sqrt().item()


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def _of_codes(weight: Any, x: Tensor, forward: bool) -> Tensor:
    """The product of the same codes, without a matrix unit."""
    if isinstance(weight, Int8Weight):
        return _of_int8_codes(weight, x, forward)
    rows = fp8.quantise_rows(x, None if forward else weight.scales)
    codes, scales = (weight.codes, weight.scales) if forward else (weight.codes_input_grad(), None)
    return fp8.product(rows, codes, scales, torch.float32, emulate=True)


def _of_int8_codes(weight: Int8Weight, x: Tensor, forward: bool) -> Tensor:
    if forward or weight.back is not None:
        other = (weight.codes, weight.scales) if forward or weight.back is None else weight.back
        rows = int8.quantise_rows(x, rotated=True)
        return int8.product(rows, other, dtype=torch.float32, impl="torch")
    codes = weight.codes.t().contiguous()
    ones = torch.ones(codes.shape[0], 1, device=codes.device)
    rows = int8.quantise_rows(x, weight.scales)
    return int8.rotate(int8.product(rows, (codes, ones), dtype=torch.float32, impl="torch"), impl="torch")
