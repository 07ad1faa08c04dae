"""A run's logged history as arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pronghorn.tuning.curves.rises import Rises
from pronghorn.tuning.run_record import RunRecord, evaluation_keys

#: Logs about a run as a whole, which are no points of a curve.
_SUMMARY = "train_runtime"


@dataclass(frozen=True)
class Curve:
    """Values fp64 [n] at rising optimizer steps int64 [n]; NaN and infinities are kept."""

    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> Curve:
        """From (step, value); of points at the same step the last counts."""
        latest = {int(step): float(value) for step, value in points}
        steps = sorted(latest)
        return cls(np.array(steps, dtype=np.int64), np.array([latest[step] for step in steps], dtype=float))

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> Curve:
        """Without what is no number."""
        return self if self._some is None else self._some

    @cached_property
    def _some(self) -> Curve | None:
        """The points that are numbers; None where all are."""
        kept = np.isfinite(self.values)
        return None if kept.all() else Curve(self.steps[kept], self.values[kept])

    @cached_property
    def rises(self) -> Rises:
        """Of a curve without gaps; a reading looks at them with several thresholds."""
        return Rises.of(self.values)

    def between(self, first: float, last: float) -> Curve:
        kept = (self.steps >= first) & (self.steps <= last)
        return Curve(self.steps[kept], self.values[kept])

    def at(self, step: float) -> float:
        """The value at the last point up to `step`, the first one's before it; NaN without points."""
        if not len(self):
            return math.nan
        return float(self.values[max(int(np.searchsorted(self.steps, step, side="right")) - 1, 0)])


NOTHING = Curve(np.zeros(0, dtype=np.int64), np.zeros(0))


@dataclass(frozen=True)
class History:
    """What is known of a run so far.

    Args:
        loss: of every step where that is known, else the averages that were logged.
        evaluations: losses on held-out rows by their key in the log.
        averaged: steps that a point of `loss` is the average of.
        max_steps: steps the run is meant to have; 0: unknown.
        max_grad_norm: what gradients are clipped to; 0: they are not, or it is unknown.
        steps_per_epoch: 0: unknown.
        rows: rows of the data as given, by step, where they are known.
        over: whether nothing more is to come.
    """

    loss: Curve = NOTHING
    grad_norm: Curve = NOTHING
    rate: Curve = NOTHING
    evaluations: Mapping[str, Curve] = field(default_factory=dict)
    averaged: int = 1
    max_steps: int = 0
    max_grad_norm: float = 0.0
    steps_per_epoch: float = 0.0
    rows: Mapping[int, Sequence[int]] = field(default_factory=dict)
    over: bool = True

    @property
    def last_step(self) -> int:
        curves = (self.loss, self.grad_norm, *self.evaluations.values())
        return max((int(curve.steps[-1]) for curve in curves if len(curve)), default=0)

    @classmethod
    def of_log(
        cls,
        log: Iterable[Mapping[str, Any]],
        *,
        step_loss: Curve = NOTHING,
        step_norm: Curve = NOTHING,
        **known: Any,
    ) -> History:
        """From Transformers' `log_history`, with each step's values where the trainer knew them."""
        entries = [entry for entry in log if "step" in entry and _SUMMARY not in entry]
        logged = _points(entries, "loss")
        norm = step_norm if len(step_norm.finite) else _points(entries, "grad_norm")
        gaps = np.diff((step_loss if len(step_loss) else logged).steps)
        epochs = [entry["step"] / entry["epoch"] for entry in entries if (entry.get("epoch") or 0) > 0]
        return cls(
            loss=step_loss if len(step_loss) else logged,
            grad_norm=norm,
            rate=_points(entries, "learning_rate").finite,
            evaluations={name: _points(entries, name) for name in evaluation_keys(entries)},
            averaged=int(np.median(gaps)) if len(gaps) else 1,
            steps_per_epoch=float(np.median(epochs)) if epochs else 0.0,
            **known,
        )

    @classmethod
    def of_record(cls, record: RunRecord) -> History:
        """From what a run left."""
        return cls.of_log(
            record.log,
            step_loss=Curve.of(zip(record.steps, record.step_losses, strict=True)),
            step_norm=Curve.of(zip(record.steps, record.step_norms, strict=True)),
            max_steps=record.max_steps,
            max_grad_norm=float(record.setting("max_grad_norm") or 0.0),
            rows=record.rows,
            over=record.state != "running",
        )


def _points(entries: Iterable[Mapping[str, Any]], key: str) -> Curve:
    return Curve.of((entry["step"], entry[key]) for entry in entries if key in entry)
