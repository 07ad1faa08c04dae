"""Seeded dropout: reproducible, unbiased, independent of anything but the seed."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.dropout import seeded_dropout
from tests.kernels.compare import DTYPES, IMPLS, RELATIVE


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_is_a_function_of_the_seed(impl, dtype, device):
    x = torch.ones(64, 128, dtype=dtype, device=device)
    first = seeded_dropout(x, 0.25, 7, impl=impl)
    assert torch.equal(first, seeded_dropout(x, 0.25, 7, impl=impl))
    assert not torch.equal(first, seeded_dropout(x, 0.25, 8, impl=impl))
    # The same mask on other values: backward applies it to gradients.
    assert torch.equal(seeded_dropout(2 * x, 0.25, 7, impl=impl), 2 * first)
    kept = first != 0
    survivors = first[kept].double().unique()
    assert len(survivors) == 1 and abs(survivors.item() - 4 / 3) <= RELATIVE[dtype] * 4 / 3
    # Five standard deviations of a binomial of 8,192 at 0.75.
    assert abs(kept.double().mean().item() - 0.75) < 5 * (0.75 * 0.25 / x.numel()) ** 0.5


@pytest.mark.parametrize("impl", IMPLS)
def test_draws_no_global_random_numbers(impl, device):
    state = torch.get_rng_state()
    seeded_dropout(torch.ones(8, 8, device=device), 0.5, 3, impl=impl)
    assert torch.equal(torch.get_rng_state(), state)


def test_probabilities(device):
    x = torch.ones(4, 4, device=device)
    assert seeded_dropout(x, 0.0, 1) is x
    with pytest.raises(ValueError, match="probability"):
        seeded_dropout(x, 1.0, 1)
