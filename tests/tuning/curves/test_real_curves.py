"""Curves of real runs, recorded with `benchmarks.curves`: faults are found, healthy runs are silent at every moment.

The healthy ones are of SmolLM2-135M-Instruct on an H200; those with a fault are of a model of two layers that reads
bytes, all of whose weights were trained on a CPU.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks.curves import CASES, verdict
from pronghorn.tuning.curves import History, read_curves
from pronghorn.tuning.run_record import load_run

RUNS = {path.stem: path for path in sorted((Path(__file__).parent / "real").glob("*.json"))}


@pytest.mark.parametrize("name", RUNS)
def test_what_was_planted_is_found_and_nothing_else(name):
    found = read_curves(History.of_record(load_run(RUNS[name])))
    assert verdict(CASES[name], found) == "", found


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("healthy")])
def test_healthy_runs_are_silent_while_they_go_on(name):
    run = History.of_record(load_run(RUNS[name]))
    for end in range(10, run.last_step, 10):
        part = {key: getattr(run, key).between(0, end) for key in ("loss", "grad_norm", "rate")}
        evaluations = {key: curve.between(0, end) for key, curve in run.evaluations.items()}
        assert read_curves(dataclasses.replace(run, **part, evaluations=evaluations, over=False)) == []


def test_a_poisoned_row_in_a_real_run():
    """A step of the healthy run with a row of shuffled words in its batch: its loss by that model, its norm assumed."""
    run = History.of_record(load_run(RUNS["healthy-docstrings"]))
    losses, norms = run.loss.values.copy(), run.grad_norm.values.copy()
    losses[150], norms[150] = 1.9 * 2.7, 3.5
    step = int(run.loss.steps[150])
    poisoned = dataclasses.replace(
        run,
        loss=dataclasses.replace(run.loss, values=losses),
        grad_norm=dataclasses.replace(run.grad_norm, values=norms),
        rows={step: (5, 17)},
    )
    (found,) = read_curves(poisoned)
    assert (found.kind, found.first, found.rows) == ("spike", step, (5, 17))
