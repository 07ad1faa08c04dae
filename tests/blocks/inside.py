"""A step with work inside its products, and with the same work apart."""

from __future__ import annotations

from typing import Any

import pytest

from pronghorn.blocks import joining
from pronghorn.engine import TrainingStep, binding_of
from tests.families.parity import Outcome, bound_copy, packed_batch, rows_batch, run, run_step

#: as in the family tests
EXACT = 5e-6
LENGTHS = (100, 7, 120, 90)


def outcomes(
    flag: str,
    model: Any,
    level: str,
    monkeypatch: pytest.MonkeyPatch,
    tile_rows: int | None = None,
    *,
    step: bool = True,
) -> list[Outcome]:
    """With a flag of `joining` set, and without."""
    rows, found = rows_batch(model.config.vocab_size, LENGTHS), []
    for inside in (True, False):
        monkeypatch.setattr(joining, flag, inside)
        fast = bound_copy(model, level)
        binding = binding_of(fast)
        assert binding is not None
        binding.tile_rows = tile_rows
        outcome = (
            run_step(TrainingStep(fast), fast, rows) if step else run(fast, packed_batch(rows), logits=False)
        )
        found.append(outcome)
    return found
