"""The planted faults of benchmarks.curves, and what makes a run red; its trainings take a GPU."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from benchmarks.curves import BATCH, CASES, POISONED, STEPS, answers_of, curves_of, of_others, some, verdict
from benchmarks.lr_finder import SEED
from pronghorn.tuning.curves import KINDS
from pronghorn.tuning.run_record import RunRecord, Setting, load_run


@pytest.mark.parametrize("name", CASES)
def test_rows_are_there_and_expected_kinds_exist(name):
    case = CASES[name]
    assert len(case.rows(SEED)) >= 48 and set(case.expected) <= KINDS.keys()
    assert name.startswith("healthy") == (not case.expected)


def test_faults_are_in_the_rows():
    clean = some("docstrings", SEED, 320)
    differ = [at for at, row in enumerate(CASES["poisoned-row"].rows(SEED)) if row != clean[at]]
    assert differ == [POISONED] and some("docstrings", SEED, 320) == clean, (
        "the data set itself stays as it is"
    )
    assert sorted(answers_of(of_others(clean))) == sorted(answers_of(clean))
    assert not any(a == b for a, b in zip(answers_of(of_others(clean)), answers_of(clean), strict=True))
    clean, end = some("docstrings", SEED, STEPS * BATCH), CASES["bad-end"].rows(SEED)
    start = 2 * STEPS // 3 * BATCH
    assert end[:start] == clean[:start] and end[start:] != clean[start:]
    assert sorted(answers_of(end)[-1].split()) == sorted(answers_of(clean)[-1].split())


def test_another_seed_takes_other_rows():
    first, second = some("docstrings", SEED, 320), some("docstrings", 7, 320)
    assert first != second and second == some("docstrings", 7, 320)
    assert len(some("docstrings", SEED)) == len(some("docstrings", 7))


def test_verdicts():
    def found(kind, hopeless=False, rows=()):
        return SimpleNamespace(kind=kind, hopeless=hopeless, rows=rows)

    healthy, poisoned, large = (CASES[n] for n in ("healthy-cosine", "poisoned-row", "rate-too-large"))
    assert verdict(healthy, []) == "" and "silence" in verdict(healthy, [found("plateau")])
    assert verdict(large, [found("divergence", True)]) == "" and "none of" in verdict(
        large, [found("plateau")]
    )
    assert "also overfitting" in verdict(large, [found("divergence", True), found("overfitting", True)])
    assert verdict(poisoned, [found("spike", rows=(3, POISONED))]) == ""
    assert "not blamed" in verdict(poisoned, [found("spike", rows=(3, 4))])


def test_what_is_kept_of_a_run_is_read_again(tmp_path):
    record = RunRecord(
        name="run", state="finished", max_steps=2, steps=[1, 2], step_losses=[2.123456789, float("nan")],
        step_norms=[1.0, 2.0], log=[{"step": 2, "loss": 2.5, "peak_memory_gib": 7.0, "epoch": 0.5}],
        settings=[Setting("max_grad_norm", 1.0, "default"), Setting("seed", 3, "given")],
    )  # fmt: skip
    path = tmp_path / "run.json"
    path.write_text(json.dumps(curves_of(record), allow_nan=False))
    again = load_run(path)
    assert again.step_losses[0] == 2.1235 and again.step_losses[1] != again.step_losses[1]
    assert again.log == [{"step": 2, "epoch": 0.5, "loss": 2.5}]
    assert again.setting("max_grad_norm") == 1.0 and again.setting("seed") is None
