"""Gradients scaled, and put back to the rows they were taken from."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.dispatch import Impl
from pronghorn.kernels.loss_rows import put_back, scaled

KINDS = [torch.float32, torch.float16]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (130, 70), (4099,), (0, 4)])
def test_scaled(shape: tuple[int, ...], dtype: torch.dtype, impl: Impl, device: torch.device) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    scale = torch.tensor(1.0009765625 / 3, device=device)  # is not itself in 16 bits
    found = scaled(gradient, scale, torch.float16, impl=impl)
    assert found.dtype == torch.float16
    assert torch.equal(found, (gradient.float() * scale).half())


def test_scaled_doubles(device: torch.device) -> None:
    gradient = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    scale = torch.tensor(1 / 3, dtype=torch.float64, device=device)
    assert torch.equal(scaled(gradient, scale, torch.float64, impl="triton"), gradient * scale)


def test_scaled_columns(device: torch.device) -> None:
    """A gradient that is not contiguous."""
    gradient = torch.arange(12.0, device=device).view(3, 4).t()
    assert torch.equal(scaled(gradient, torch.tensor(0.5, device=device), torch.float32), gradient * 0.5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("rows", [[0, 2, 3], [4, 1], [0, 1, 2, 3, 4], [], [2, 4, 4, 4]])
@pytest.mark.parametrize("width", [5, 2100])
def test_put_back(width: int, rows: list[int], dtype: torch.dtype, impl: Impl, device: torch.device) -> None:
    gradient = torch.randn(len(rows), width + 3, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    gradient = gradient[:, :width]
    if len(set(rows)) < len(rows):
        gradient[rows.index(4) :] = 0.0
    want = torch.zeros(5, width, dtype=dtype, device=device)
    for place, row in enumerate(rows):
        want[row] = gradient[place]
    found = put_back(gradient, torch.tensor(rows, dtype=torch.int64, device=device), 5, impl=impl)
    assert torch.equal(found, want)
