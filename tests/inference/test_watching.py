"""Numbers that tell whether weights have been written to, by CPU and by other devices' way."""

from __future__ import annotations

import pytest
import torch

from pronghorn.inference.watching import _norms_and_maxima, _sums_of


@pytest.mark.parametrize("numbers_of", [_sums_of, _norms_and_maxima])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_writes_are_seen(numbers_of, dtype):
    stored = torch.randn(81, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    tensors = [stored[:40].view(4, 10), stored[41:].view(5, 8)]  # the second one begins between two words
    before = numbers_of(tensors)
    assert numbers_of(tensors) == before
    tensors[1].neg_()
    negated = numbers_of(tensors)
    assert negated != before
    tensors[1].mul_(1.01)
    assert numbers_of(tensors) not in (before, negated)
    tensors[0][0, 0] = float("nan")
    assert numbers_of(tensors) == numbers_of(tensors), "what is no number has not changed either"
