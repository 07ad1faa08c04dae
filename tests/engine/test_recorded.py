"""Recorded steps where recording fails, and what they are told apart by; without a GPU."""

from __future__ import annotations

import pytest

from pronghorn.data.budgets import Budgets
from pronghorn.engine import TrainingStep
from tests.engine.recorded import pretend_to_record
from tests.engine.test_step import ON_GPU, adapted, assert_same, by_autograd, collated, gradients, rows

pytestmark = pytest.mark.skipif(ON_GPU, reason="pretends on the CPU")


def test_a_recording_that_fails_is_told_once_and_the_step_runs_eagerly(monkeypatch, caplog) -> None:
    pretend_to_record(monkeypatch)
    tried = []

    def failing(self, *given):
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    monkeypatch.setattr(TrainingStep, "_capture", failing)
    model = adapted()
    _, expected = by_autograd(model, rows())
    step, budgets = TrainingStep(model), Budgets()
    for _ in range(2):
        model.zero_grad()
        step.run(*collated(rows(), budgets))
        assert_same(gradients(model), expected)
    assert len(tried) == 1 and not step.capture
    assert caplog.text.count("the capture failed (RuntimeError: operation not permitted") == 1
    assert "second line" not in caplog.text


def test_a_recorded_step_has_the_gradients_of_autograd(monkeypatch) -> None:
    pretend_to_record(monkeypatch)
    model = adapted("qwen3")
    step, budgets = TrainingStep(model), Budgets()
    for seed, lengths in enumerate(((9, 30, 5), (40, 2), (9, 31, 5))):
        _, expected = by_autograd(model, rows(lengths, seed))
        model.zero_grad()
        step.run(*collated(rows(lengths, seed), budgets))
        assert_same(gradients(model), expected)
    captured = step.captured
    step.run(*collated(rows((9, 31, 5), 2), budgets))
    assert 0 < captured == step.captured
