"""Curves of real runs, recorded with `benchmarks.curves`: faults are found, healthy runs are silent at every moment.

Those in `real` are of SmolLM2-135M-Instruct on an H200; those in `real/bytes` of a model of two layers that reads
bytes, all of whose weights were trained on a CPU; those in `real/unseen` of SmolLM2-135M-Instruct on a CPU with a seed
(11) that no rule was tuned with. Two of the H200's were completed by what the library has kept since:
the rows of steps 101 and 162 of `poisoned-row`, out of its seed, and the step that ended `broken-weight`, out of its
error and its seed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from benchmarks.curves import CASES, POISONED, verdict
from pronghorn.tuning.curves import Curve, Finding, History, outstanding_steps, read_curves
from pronghorn.tuning.run_record import load_run

REAL = Path(__file__).parent / "real"
RUNS = {
    path.relative_to(REAL).with_suffix("").as_posix(): path
    for path in sorted(REAL.glob("**/*.json"))
    if path.stem in CASES
}


def run_of(name: str) -> History:
    return History.of_record(load_run(REAL / f"{name}.json"))


def while_it_goes_on(run: History, end: int) -> list[Finding]:
    part = {key: getattr(run, key).between(0, end) for key in ("loss", "grad_norm", "rate")}
    evaluations = {key: curve.between(0, end) for key, curve in run.evaluations.items()}
    return read_curves(dataclasses.replace(run, **part, evaluations=evaluations, over=False))


def test_every_case_was_recorded():
    assert {path.stem for path in RUNS.values()} == set(CASES)


@pytest.mark.parametrize("name", RUNS)
def test_what_was_planted_is_found_and_nothing_else(name):
    found = read_curves(run_of(name))
    assert verdict(CASES[RUNS[name].stem], found) == "", found


@pytest.mark.parametrize("name", [name for name in RUNS if RUNS[name].stem.startswith("healthy")])
def test_healthy_runs_are_silent_while_they_go_on(name):
    run = run_of(name)
    for end in range(10, run.last_step, 5):
        assert while_it_goes_on(run, end) == [], end


@pytest.mark.parametrize("name", ["docstrings", "constant", "cosine", "accumulated"])
def test_healthy_runs_are_silent_whatever_the_order_of_their_batches(name):
    """Their trend, with what batches differ from it by in other orders: more runs with the noise of real ones."""
    run = run_of(f"healthy-{name}")
    at = np.arange(len(run.loss)) / len(run.loss)
    shape = np.stack((np.ones_like(at), np.log1p(40 * at), at), axis=1)
    logs = np.log(np.stack((run.loss.values, run.grad_norm.values), axis=1))
    trend = shape @ np.linalg.lstsq(shape, logs, rcond=None)[0]
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(at))
        loss, norm = np.exp(trend + (logs - trend)[order]).T
        other = dataclasses.replace(
            run, loss=Curve(run.loss.steps, loss), grad_norm=Curve(run.grad_norm.steps, norm)
        )
        assert read_curves(other) == [], seed


@pytest.mark.parametrize(
    "name,since", [("rate-too-large", 25), ("rate-grows-too-large", 25), ("bad-end", 170)]
)
def test_what_ends_a_run_stays_said(name, since):
    """A loss of 43 that comes back to twice what training began with is no setback."""
    run = run_of(name)
    for end in range(since, run.last_step, 5):
        assert any(finding.hopeless for finding in while_it_goes_on(run, end)), end


def test_evaluations_tell_that_nothing_is_learned():
    """Its batches differ by 8 %, so that 240 losses cannot say it."""
    run = run_of("rate-too-small")
    (found,) = read_curves(run)
    assert found.what.startswith(
        "The evaluation loss went from 3.977 at step 30 to 3.969 at step 240 at rates of"
    )
    assert read_curves(dataclasses.replace(run, evaluations={})) == []


def test_the_row_of_three_high_steps_is_named():
    """They are the highest of the run, at 5 to 6 spreads, without a jump of the gradient's norm."""
    run = run_of("poisoned-row")
    assert outstanding_steps(run) == [30, 101, 162]
    (found,) = [finding for finding in read_curves(run) if finding.kind == "spike-rows"]
    assert (found.first, found.last, found.rows) == (30, 162, (POISONED,))


def test_a_run_that_learns_48_rows_by_heart_does_not_diverge_at_a_loss_of_zero():
    """From 0.013 to 0.06 at step 55: a factor of five, and nothing."""
    assert while_it_goes_on(run_of("few-rows"), 60) == []


def test_the_length_of_a_swing_is_no_multiple_of_it():
    """Twelve steps of docstrings, twelve of functions: noise hides the return after 24 steps more than after 72."""
    (found,) = read_curves(run_of("unseen/blocks"))
    assert found.kind == "oscillation" and found.what.endswith("once in about 24 steps.")


def test_blocks_of_two_kinds_that_come_to_the_same_loss():
    """Twelve steps of docstrings, then twelve of characters: the first blocks differ, the last ones do not."""
    run = run_of("blocks-alike")
    assert {finding.kind for finding in while_it_goes_on(run, 100)} == {"setback"}
    assert read_curves(run) == []


def test_a_poisoned_row_in_a_real_run():
    """A step of the healthy run with a row of shuffled words in its batch: its loss by that model, its norm assumed."""
    run = run_of("healthy-docstrings")
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
