"""Sums of partial results, of which some rows or columns have fewer."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.triton.lora_sums import Few, sum_a_grads, sum_rows


def partial(pieces: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(pieces, rows, columns, generator=generator).to(device)


@pytest.mark.parametrize("pieces", [5, 70])
@pytest.mark.parametrize("few", [None, Few(3, 128), Few(3, 4096)])
def test_rows(pieces: int, few: Few | None, device: torch.device) -> None:
    given = partial(pieces, 200, 16, device)
    out = torch.full((200, 16), float("nan"), device=device)
    until = min(few.until, 200) if few else 0
    given[3:, :until] = float("nan")  # nobody wrote these
    sum_rows(given, out, *(() if few is None else (few,)))
    torch.testing.assert_close(out[:until], given[:3, :until].sum(0))
    torch.testing.assert_close(out[until:], given[:, until:].sum(0))


@pytest.mark.parametrize("pieces", [5, 70])
@pytest.mark.parametrize("few", [None, Few(2, 256), Few(2, 3072)])
def test_gradients_of_a(pieces: int, few: Few | None, device: torch.device) -> None:
    given = partial(pieces, 8, 600, device)
    until = min(few.until, 600) if few else 0
    given[2:, :, :until] = float("nan")
    grad = torch.ones(8, 600, device=device)
    sum_a_grads(given, grad, *(() if few is None else (few,)))
    torch.testing.assert_close(grad[:, :until], 1 + given[:2, :, :until].sum(0))
    torch.testing.assert_close(grad[:, until:], 1 + given[:, :, until:].sum(0))
