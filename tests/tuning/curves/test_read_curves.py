"""Planted faults are found, with their steps; healthy runs, however noisy, are silent."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from pronghorn.tuning.curves import KINDS, Curve, Finding, History, outstanding_steps, read_curves, rises
from tests.tuning.curves.synthetic import descent, healthy, history, schedule

SEEDS = range(12)


def kinds(run: History) -> set[str]:
    return {finding.kind for finding in read_curves(run)}


def only(run: History, kind: str) -> Finding:
    """The one finding of a kind, and none of another that ends a run."""
    found = read_curves(run)
    mine = [finding for finding in found if finding.kind == kind]
    assert len(mine) == 1, found
    assert not [finding for finding in found if finding.hopeless and finding.kind != kind], found
    return mine[0]


def noisy(clean: np.ndarray, seed: int, sigma: float = 0.05) -> np.ndarray:
    return clean * np.exp(sigma * np.random.default_rng(seed).standard_normal(len(clean)))


@pytest.mark.parametrize("seed", range(300))
def test_healthy_runs_are_silent(seed):
    assert read_curves(healthy(seed)) == []


@pytest.mark.parametrize("seed", range(60))
def test_healthy_runs_are_silent_at_every_moment(seed):
    """While they go on, too: what is told live is told of a run's beginning."""
    run = healthy(seed, count=400)
    for end in (3, 10, 25, 60, 130, 200, 320):
        part = {name: getattr(run, name).between(0, end) for name in ("loss", "grad_norm", "rate")}
        evaluations = {name: curve.between(0, end) for name, curve in run.evaluations.items()}
        assert read_curves(dataclasses.replace(run, **part, evaluations=evaluations, over=False)) == [], end


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("seldom", [False, True])
def test_overfitting(seed, seldom):
    loss = noisy(descent(600, last=0.6), seed)
    steps = np.arange(100, 601, 100 if seldom else 50)
    values = (
        1.82
        + 0.05 * np.abs(steps - 300) / 100
        + 0.002 * np.random.default_rng(seed).standard_normal(len(steps))
    )
    found = only(history(loss, evaluations=(steps, values)), "overfitting")
    assert found.hopeless and found.last == 600
    assert found.best_step is not None and abs(found.best_step - 300) <= 50
    assert f"at step {found.first} to {values[-1]:.4g} at step 600" in found.what
    assert f"step {found.best_step} are the best" in found.advice


@pytest.mark.parametrize("seed", SEEDS)
def test_an_evaluation_loss_that_only_varies_is_no_overfitting(seed):
    random = np.random.default_rng(seed)
    steps = np.arange(50, 601, 50)
    values = 1.8 * np.exp(0.03 * random.standard_normal(len(steps)))
    assert "overfitting" not in kinds(history(noisy(descent(600), seed), evaluations=(steps, values)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sigma", [0.02, 0.15])
def test_divergence(seed, sigma):
    clean = descent(500, first=4.0, last=1.4)
    clean[350:] *= np.linspace(1, 1.9, 150) ** 0.7
    found = only(history(noisy(clean, seed, sigma)), "divergence")
    assert found.level == "error" and found.hopeless
    assert 280 <= found.first <= 400 and found.last == 500
    assert "learning_rate (0.0002 there)" in found.advice


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rate_that_is_too_large_from_the_start(seed):
    clean = np.concatenate(([2.1], np.full(80, 7.5)))
    found = only(history(noisy(clean, seed, 0.1)), "rate-too-large")
    assert found.first == 1 and found.hopeless and "tenth of the learning_rate" in found.advice


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rate_that_becomes_too_large_in_warm_up(seed):
    clean = np.concatenate((np.linspace(2.4, 2.1, 40), np.linspace(2.1, 6.5, 40), np.full(60, 6.4)))
    rates = schedule("constant", len(clean), peak=0.02, warmup=100)
    found = only(history(noisy(clean, seed), rates=rates), "rate-too-large")
    assert 30 <= found.first <= 60


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rise_that_is_made_good_again_is_a_setback(seed):
    clean = descent(400)
    clean[150:230] *= 1 + 0.9 * np.sin(np.linspace(0, np.pi, 80))
    found = only(history(noisy(clean, seed)), "setback")
    assert not found.hopeless and 120 < found.first < 200 < found.last + 40


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rise_that_is_made_good_in_part_is_no_setback(seed):
    """Back at twice the loss that training began with, from ten times."""
    clean = np.concatenate(
        (np.linspace(3.8, 2.6, 12), np.geomspace(2.6, 40, 20), 7.5 + 30 * np.exp(-np.arange(208) / 15))
    )
    assert only(history(noisy(clean, seed)), "rate-too-large").last == 240


def test_a_rise_of_nothing_is_none():
    clean = np.concatenate((np.geomspace(3, 0.01, 100), np.full(60, 0.05)))
    assert not {"divergence", "setback", "rate-too-large"} & kinds(history(noisy(clean, 0)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sigma", [0.02, 0.1])
def test_spikes_and_their_rows(seed, sigma):
    random = np.random.default_rng(100 + seed)  # noise of its own, beside that of the losses
    loss, norms = noisy(descent(600), seed, sigma), np.exp(0.2 * random.standard_normal(600))
    order = np.concatenate([random.permutation(800) for _ in range(3)]).reshape(600, 4)
    rows = {step: tuple(map(int, order[step - 1])) for step in range(1, 601)}
    bad = 137
    planted = [step for step in rows if bad in rows[step] and step > 40]
    for step in planted:
        loss[step - 1] *= 3.5
        norms[step - 1] = 40.0
    run = history(loss, norms=norms, rows=rows, steps_per_epoch=200)
    found = [finding for finding in read_curves(run) if finding.kind == "spike"]
    assert [finding.first for finding in found] == planted
    assert all(finding.rows == rows[finding.first] for finding in found)
    assert "gradient norm of 40" in found[0].what and not found[0].hopeless
    if len(planted) > 1:
        assert only(run, "spike-rows").rows == (bad,)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_bad_row_in_a_small_batch_is_seen_in_loss_and_gradient_together(seed):
    """Batches of four short rows vary by ±12 %: a row that doubles one's loss is not sure by itself."""
    loss = noisy(descent(400), seed, 0.12)
    norms = np.exp(0.25 * np.random.default_rng(100 + seed).standard_normal(400))
    loss[300], norms[300] = 2.1 * descent(400)[300], 5.0
    rows = {301: (8, 17)}
    assert only(history(loss, norms=norms, rows=rows), "spike").rows == (8, 17)


def epochs_of(rows: np.ndarray, seed: int, *, batch: int, epochs: int = 3) -> History:
    """A healthy run of several epochs over rows whose losses are these times its own."""
    random = np.random.default_rng(seed)
    count = len(rows) // batch
    order = np.concatenate([random.permutation(len(rows)) for _ in range(epochs)]).reshape(-1, batch)
    loss = noisy(descent(len(order)) * rows[order].mean(axis=1), seed, 0.03)
    known = {step: tuple(map(int, of_step)) for step, of_step in enumerate(order, 1)}
    return history(
        loss, norms=np.exp(0.2 * random.standard_normal(len(order))), rows=known, steps_per_epoch=count
    )


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("batch", [1, 4])
def test_rows_that_are_harder_than_others_are_not_blamed(seed, batch):
    rows = np.exp(0.3 * np.random.default_rng(50 + seed).standard_normal(320))
    assert kinds(epochs_of(rows, seed, batch=batch)) == set()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_row_that_is_high_in_every_epoch_is_blamed(seed):
    """Its batches of four are at about six spreads: no spikes, but three of them with the same row are no chance."""
    rows = np.exp(0.3 * np.random.default_rng(50 + seed).standard_normal(320))
    rows[9] = 8.0
    run = epochs_of(rows, seed, batch=4)
    planted = {
        step for step in run.rows if 9 in run.rows[step] and 40 < step <= 237
    }  # before, and back by the end
    assert planted <= set(outstanding_steps(run))
    if len(planted) == 3:
        assert only(run, "spike-rows").rows == (9,)


def test_a_curve_is_compared_with_what_was_before_once_a_reading(monkeypatch):
    """Whatever thresholds are tried on it, and the steps whose rows are kept with it."""
    compared: list[int] = []
    kept = rises.Rises.of
    monkeypatch.setattr(rises.Rises, "of", lambda values: compared.append(len(values)) or kept(values))
    loss = noisy(descent(200), 0)
    loss[120] = np.nan
    run = history(loss, norms=noisy(np.ones(200), 1))
    read_curves(run)
    assert isinstance(outstanding_steps(run), list)
    assert sorted(compared) == [199, 200]


def test_rows_that_meet_by_chance_are_not_blamed():
    loss = noisy(descent(600), 0)
    rows = {step: tuple(range(64)) if step in (200, 500) else () for step in range(1, 601)}
    for step in (200, 500):
        loss[step - 1] *= 3
    assert "spike-rows" not in kinds(history(loss, rows=rows, steps_per_epoch=4))


def test_a_step_that_stays_up_is_no_spike():
    clean = descent(400, first=8)
    clean[200:] += 1.5
    assert "spike" not in kinds(history(noisy(clean, 1)))


@pytest.mark.parametrize("seed", SEEDS)
def test_plateau(seed):
    clean = 1.6 + 0.9 * np.exp(-np.arange(500) / 25)
    found = only(history(noisy(clean, seed, 0.02)), "plateau")
    assert found.level == "note" and 100 < found.first < 300
    assert re.search(r"stayed at 1\.(59|6)", found.what)


def test_a_flat_end_of_a_falling_rate_is_no_plateau():
    clean = 1.6 + 0.9 * np.exp(-np.arange(500) / 90)
    rates = np.where(np.arange(500) < 100, 2e-4, 2e-5)
    assert kinds(history(noisy(clean, 3, 0.02), rates=rates)) == set()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rate_that_is_too_small(seed):
    clean = np.linspace(2.104, 2.096, 300)
    found = only(
        history(noisy(clean, seed, 0.02), rates=schedule("cosine", 300, peak=1e-7)), "rate-too-small"
    )
    assert "rates of at most 1e-07" in found.what and "tenfold" in found.advice


def evaluated(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    steps = np.linspace(30, 240, len(values)).astype(int)
    return steps, values * np.exp(0.001 * np.random.default_rng(seed).standard_normal(len(values)))


@pytest.mark.parametrize("seed", SEEDS)
def test_evaluations_say_more_than_batches(seed):
    """Batches that differ by 6 % prove little in 240 steps."""
    loss = noisy(np.full(240, 2.1), seed, 0.06)
    still = history(loss, evaluations=evaluated(np.full(8, 2.0), seed))
    assert only(still, "rate-too-small").what.startswith("The evaluation loss went from")
    assert kinds(history(loss, evaluations=evaluated(np.linspace(2.0, 1.9, 8), seed))) == set()
    # What was learned before the first evaluation counts.
    fell = noisy(2.1 + 0.5 * np.exp(-np.arange(240) / 8), seed, 0.06)
    assert "rate-too-small" not in kinds(history(fell, evaluations=evaluated(np.full(8, 2.0), seed)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("length", [2, 7, 30])
def test_oscillation(seed, length):
    clean = descent(400) * (1 + 0.12 * np.sin(2 * np.pi * np.arange(400) / length + np.pi / 2))
    found = only(history(noisy(clean, seed), steps_per_epoch=1000), "oscillation")
    told = re.search(r"±1\d% around .* once in about (\d+) steps", found.what)
    assert told is not None and abs(int(told[1]) - length) <= length // 20


def test_a_swing_of_one_epoch_is_the_order_of_the_rows():
    clean = descent(400) * (1 + 0.12 * np.sin(2 * np.pi * np.arange(400) / 40))
    assert kinds(history(noisy(clean, 0), steps_per_epoch=40)) == set()


@pytest.mark.parametrize("lasting", [False, True])
def test_losses_that_are_no_numbers(lasting):
    loss = noisy(descent(100), 0)
    loss[60 : 100 if lasting else 62] = np.nan
    found = only(history(loss, rows={61: (3, 4)}), "not-a-number")
    assert (found.first, found.last) == (61, 100 if lasting else 62)
    assert found.hopeless == lasting and found.rows == (3, 4)


def test_overflows_of_loss_scaling_are_none():
    norms = np.ones(200)
    norms[:9] = np.inf
    norms[150] = np.inf
    run = history(noisy(descent(200), 0), norms=norms)
    assert kinds(run) == set()
    norms[100:140] = np.nan
    assert "not-a-number" in kinds(history(noisy(descent(200), 0), norms=norms))


def test_gradients():
    random = np.random.default_rng(0)
    flat = noisy(np.full(300, 2.0) + np.linspace(1.5, 0, 300), 0)
    norms = np.exp(0.2 * random.standard_normal(300))
    growing = history(
        np.concatenate((flat[:150], noisy(np.full(150, 2.7), 1))), norms=norms * np.geomspace(0.3, 60, 300)
    )
    assert "gradient-growth" in kinds(growing)
    assert "gradient-zero" in kinds(history(flat, norms=np.where(np.arange(300) % 50 == 9, 0.0, norms)))
    assert "clipping" in kinds(history(flat, norms=20 * norms))
    assert kinds(history(flat, norms=20 * norms, max_grad_norm=0.0)) == set()
    norms[200] = 60.0
    found = only(history(flat, norms=norms, rows={201: (5,)}), "gradient-spike")
    assert found.first == 201 and found.rows == (5,) and "Its row of the training data: 5." in found.what


def test_logged_averages_are_enough():
    """A trainer_state.json of any trainer: a loss every ten steps, evaluations, a summary at the end."""
    random = np.random.default_rng(0)
    log: list[dict] = []
    for step in range(10, 601, 10):
        loss = 1.2 + 0.8 * (step / 10) ** -0.5 + 0.01 * random.standard_normal()
        if step == 400:
            loss *= 2
        log.append({"step": step, "loss": loss, "grad_norm": 1.0, "learning_rate": 1e-4, "epoch": step / 200})
        if step % 100 == 0:
            log.append({"step": step, "eval_loss": 1.5 + abs(step - 200) / 1000, "epoch": step / 200})
    log.append({"step": 600, "train_loss": 1.4, "train_runtime": 9.0})
    run = History.of_log(log)
    assert run.averaged == 10 and run.steps_per_epoch == pytest.approx(200)
    found = {finding.kind: finding for finding in read_curves(run)}
    assert set(found) == {"overfitting", "spike"}
    assert (found["spike"].first, found["spike"].last) == (391, 400)
    assert found["overfitting"].best_step == 200


def test_nothing_is_read_into_nothing():
    assert read_curves(History()) == []
    assert read_curves(history(np.array([2.0]))) == []
    assert read_curves(history(np.full(50, np.nan)))[0].kind == "not-a-number"


def test_a_curve_keeps_the_last_value_of_a_step():
    curve = Curve.of([(2, 5.0), (1, 4.0), (2, 6.0)])
    assert curve.steps.tolist() == [1, 2] and curve.values.tolist() == [4.0, 6.0]
    assert curve.at(0) == 4.0 and curve.at(7) == 6.0


def test_kinds_are_named_once_and_described():
    page = (Path(__file__).parents[3] / "docs" / "reading-curves.md").read_text(encoding="utf-8")
    for name, kind in KINDS.items():
        assert kind.id == name and f"| `{name}` |" in page
