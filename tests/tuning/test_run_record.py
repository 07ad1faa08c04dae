"""A run's record: written whole, read back as it was, and whatever is none refused in one sentence."""

from __future__ import annotations

import json
import math

import pytest

from pronghorn.errors import RunUnreadable
from pronghorn.tuning.run_record import RECORD, RunRecord, Sample, Setting, load_run


def record() -> RunRecord:
    return RunRecord(
        name="run",
        state="finished",
        max_steps=3,
        settings=[
            Setting("learning_rate", 1e-4, "given"),
            Setting("max_length", 512, "planned", "was 'auto'"),
        ],
        log=[
            {"step": 1, "loss": 2.0},
            {"step": 2, "loss": math.nan},
            {"step": 3, "eval_loss": 1.5, "eval_b_loss": 2.0},
        ],
        steps=[1, 2, 3],
        step_losses=[2.0, math.nan, math.inf],
        step_norms=[math.nan] * 3,
        memory=[(1, 10, 20)],
        rows={2: [5, 6]},
        samples=[Sample("p", "e", "b", "a")],
    )


def test_it_is_read_back_as_it_was(tmp_path):
    path = record().save(tmp_path)
    json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert [entry.name for entry in tmp_path.iterdir()] == [RECORD]
    read = load_run(tmp_path)
    assert read.settings == record().settings and read.samples == record().samples
    assert read.rows == {2: [5, 6]} and read.memory == [(1, 10, 20)]
    assert read.step_losses[0] == 2.0 and all(map(math.isnan, read.step_losses[1:]))
    assert math.isnan(read.log[1]["loss"])
    assert load_run(path).name == "run"


def test_what_is_asked_of_it():
    run = record()
    assert run.last("eval_loss") == 1.5 and run.last("grad_norm") is None
    assert run.evaluations() == ["eval_b_loss", "eval_loss"]
    assert run.setting("max_length") == 512 and run.setting("absent") is None
    assert [setting.text for setting in run.settings] == ["0.0001", "512"]
    assert run.losses()[0] == (1.0, 2.0) and run.norms() == []
    run.steps = []
    assert run.losses()[0] == (1, 2.0)


def test_the_state_of_any_trainer_will_do(tmp_path):
    for step in (5, 40):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        log = [{"step": n, "loss": 1.0} for n in range(1, step + 1)]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log, "max_steps": 50}))
    assert len(load_run(tmp_path).log) == 40 and load_run(tmp_path).name == tmp_path.name
    assert len(load_run(tmp_path / "checkpoint-5").log) == 5
    assert load_run(tmp_path / "checkpoint-5" / "trainer_state.json").max_steps == 50


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"log_history": 3}',
        '{"settings": [1]}',
        '{"rows": 1}',
        '{"log_history": [], "max_steps": 1e999}',
    ],
)
def test_what_is_no_record_is_refused(tmp_path, content):
    with pytest.raises(RunUnreadable, match="neither"):
        load_run(tmp_path)
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(RunUnreadable, match="no record of a run"):
        load_run(tmp_path)
