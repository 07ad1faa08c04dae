"""CUDA graphs on a machine that has none: what is recorded runs again over its static inputs at every replay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn.engine import step as steps
from pronghorn.engine.step import TrainingStep


class _Graph:
    def __init__(self, step: TrainingStep, inputs: dict[str, torch.Tensor], numbers: dict[str, int]) -> None:
        self.step, self.inputs, self.numbers = step, inputs, numbers
        self.record: Any = None

    def replay(self) -> None:
        for held in self.inputs.values():
            held.grad = None
        found = self.step._execute({**self.inputs, **self.numbers}, self.record.counts)
        self.record.output = found
        self.record.trained = [name for name, held in self.inputs.items() if held.grad is not None]


def pretend_to_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `TrainingStep` record its steps on the CPU."""

    def capture(self: TrainingStep, key: Any, given: dict, numbers: dict, counted: int) -> Any:
        inputs = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in given.items()}
        graph = _Graph(self, inputs, numbers)
        record = steps._Graph(graph, inputs, steps._ones(counted, torch.device("cpu")), None)  # type: ignore[arg-type]
        graph.record = record
        # What compiles kernels on a GPU must be a batch that the task takes.
        self._run_for_nothing(self.task.warm_up(torch.device("cpu"), frozenset(given)), counted, None)
        self._graphs[key] = record
        self.captured += 1
        return record

    monkeypatch.setattr(TrainingStep, "_capture", capture)
    monkeypatch.setattr(TrainingStep, "why_eager", lambda self, device: None)
    monkeypatch.setattr("pronghorn.engine.tasks.CAPTURABLE", ("cpu", "sdpa", "eager"))
