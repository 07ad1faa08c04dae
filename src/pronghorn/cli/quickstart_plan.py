"""How much the quickstart trains, by hardware."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """How much is trained: on two CPU cores what fits into minutes, on a GPU one pass over all rows.

    ``seconds`` ends the training early on a slow machine; ``steps`` None is one pass.
    """

    steps: int | None
    rows_per_step: int
    held_back: int
    seconds: float | None = None
    learning_rate: float = 1e-3
    rank: int = 16
    max_length: int = 256

    @staticmethod
    def on(device: str) -> Plan:
        if device == "cuda":
            return Plan(steps=None, rows_per_step=32, held_back=256)
        return Plan(steps=72, rows_per_step=12, held_back=64, seconds=170)
