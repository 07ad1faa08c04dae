"""Wrong labels are planted as told, runs differ by them and by seeds only, and the model ends as it came."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from pronghorn.errors import DatasetUnusable
from pronghorn.experiments.stress import Score, StressReport, stress, swap_answers
from tests.training.runs import adapter_model, trained, trainer

QUESTIONS = [("how many", "seven"), ("what colour", "green"), ("which way", "north")]


def chats(count: int) -> Dataset:
    """Each question has its answer."""
    return Dataset.from_list(
        [{"prompt": f"{QUESTIONS[n % 3][0]} {n}? ", "completion": QUESTIONS[n % 3][1]} for n in range(count)]
    )


def token_rows(count: int = 40) -> Dataset:
    rows = [
        {"input_ids": [1, 2, n, 9 + n % 3], "labels": [-100, -100, -100, 9 + n % 3]} for n in range(count)
    ]
    return Dataset.from_list(rows)


def test_answers_are_swapped():
    rows = token_rows()
    wrong = swap_answers(rows, 0.25, seed=3)
    changed = [n for n in range(40) if wrong.rows[n]["input_ids"] != rows[n]["input_ids"]]
    assert wrong.count == len(changed) == 10  # an equal answer would be no wrong one
    for n in range(40):
        ids, labels = wrong.rows[n]["input_ids"], wrong.rows[n]["labels"]
        assert ids[:3] == [1, 2, n] and labels == [-100, -100, -100, ids[3]] and ids[3] in (9, 10, 11)
    more = swap_answers(rows, 0.5, seed=3)
    also = [n for n in range(40) if more.rows[n]["input_ids"] != rows[n]["input_ids"]]
    assert len(also) == 20 and set(changed) <= set(also)
    assert swap_answers(rows, 0.25, seed=4).rows.to_list() != wrong.rows.to_list()
    assert swap_answers(rows, 0.0, seed=3).rows is rows


def test_rows_that_cannot_be_wrong_are_refused():
    text = Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2]}] * 4)
    with pytest.raises(DatasetUnusable, match="without prompts"):
        swap_answers(text, 0.5, 0)
    same = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}] * 4)
    with pytest.raises(DatasetUnusable, match="same answer"):
        swap_answers(same, 0.5, 0)


def test_wrong_labels_move_the_score(tmp_path):
    model = adapter_model()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    before, told = trained(model), []
    run = trainer(
        tmp_path / "out", model, chats(48), eval_dataset=chats(9), max_steps=25, optim="adamw_torch",
        learning_rate=2e-2, per_device_train_batch_size=8, report=True, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    report = stress(run, shares=(0.5,), seeds=(0, 1), on_score=told.append)
    assert [(score.share, score.seed) for score in report.scores] == [(0.0, 0), (0.0, 1), (0.5, 0), (0.5, 1)]
    assert list(report.scores) == told and report.steps == 25 and (report.rows, report.held_out) == (48, 9)
    clean, wrong = report.levels
    assert clean.shift == 0.0 and clean.spread > 0 and (clean.wrong, wrong.wrong) == (0, 24)
    assert wrong.shift > 2 * clean.spread and wrong.accuracy < clean.accuracy
    assert "50% wrong answers raise it by" in report.sentences()[1]
    assert all(torch.equal(value, before[name]) for name, value in trained(model).items())
    assert not list((tmp_path / "out").iterdir()), "runs of a series leave nothing"


def test_the_same_seed_gives_the_same_score(tmp_path):
    """Whatever ran before it on the model that is loaded once."""
    run = trainer(
        tmp_path, rows=chats(12), eval_dataset=chats(3), max_steps=3, optim="adamw_torch", learning_rate=1e-2
    )
    scores = stress(run, shares=(), seeds=(5, 6, 5)).scores
    assert scores[0].loss == scores[2].loss != scores[1].loss


def test_words():
    def scores(share, losses):
        return [Score(share, seed, 0, loss, 0.5) for seed, loss in enumerate(losses)]

    report = StressReport(
        (*scores(0.0, (1.0, 1.2)), *scores(0.1, (1.01, 1.21)), *scores(0.2, (1.5, 1.7))), 9, 9, 9
    )
    assert report.sentences() == [
        "By itself the held-out loss varies by 0.1414 (standard deviation of 2 seeds).",
        "10% wrong answers raise it by 0.0100 (0.9%), less than that.",
        "20% wrong answers raise it by 0.5000 (45.5%), 3.5 times that.",
    ]
    assert report.levels[1].shift_spread == pytest.approx(0.0)
    assert report.as_dict()["levels"][2]["shift"] == pytest.approx(0.5)


def test_packed_rows_are_taken_apart(tmp_path):
    run = trainer(tmp_path, rows=chats(12), eval_dataset=chats(3), max_steps=1, packing=True, max_length=200)
    assert len(run.train_dataset) < 12
    report = stress(run, shares=(0.5,), seeds=(0,))
    assert report.rows == 12 and report.scores[1].wrong == 6


def test_what_cannot_be_scored(tmp_path):
    with pytest.raises(DatasetUnusable, match="no held-out rows"):
        stress(trainer(tmp_path, rows=chats(12)))
    stream = trainer(tmp_path, rows=chats(12).to_iterable_dataset(), eval_dataset=chats(3))
    with pytest.raises(DatasetUnusable, match="stream"):
        stress(stream)


def test_rows_that_cannot_be_wrong_are_refused_before_anything_is_trained(tmp_path):
    rows = [{"prompt": f"Is it {n}? ", "completion": "yes"} for n in range(12)]
    told = []
    with pytest.raises(DatasetUnusable, match="all rows have the same answer"):
        stress(
            trainer(tmp_path, rows=Dataset.from_list(rows), eval_dataset=chats(3), max_steps=1),
            on_score=told.append,
        )
    assert not told
