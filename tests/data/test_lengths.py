"""Lengths, the advice drawn from them, and what padding costs."""

from __future__ import annotations

import json
import random
from array import array

import pytest

from pronghorn.data import stats
from pronghorn.data.checks.measure import Meter, measure
from pronghorn.data.lengths import LengthReport
from pronghorn.data.rows import RowFormat, RowRenderer, supervised
from pronghorn.errors import RowsUnreadable
from tests.tiny import tiny_tokenizer


def chat(number):
    pick = random.Random(number)
    answer = " ".join(pick.choices(["grass", "cactus", "sagebrush"], k=pick.randint(1, 30)))
    return {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}]}


def report_of(lengths, **options):
    return LengthReport(["x"], array("Q", lengths), array("Q", [1] * len(lengths)), **options)


def test_lengths_are_those_of_training(tmp_path):
    rows = [chat(i) for i in range(40)]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"messages": []}\n{"mess\n')
    tokenizer = tiny_tokenizer()
    report = stats(path, tokenizer, workers=1)
    render = RowRenderer(tokenizer, RowFormat(responses_only=True))
    expected = [render(row) for row in rows]
    assert list(report.tokens) == [len(row["input_ids"]) for row in expected]
    assert list(report.supervised) == [supervised(row["labels"]) for row in expected]
    assert report.problems == {"empty-field": 1, "truncated": 1}
    facts = json.loads(json.dumps(report.as_dict()))
    assert facts["rows"] == 40 and 0 < facts["supervised_share"] < 1
    everything = stats(path, tokenizer, workers=1, responses_only=False)
    assert sum(everything.supervised) == sum(report.tokens) - len(report.tokens)


def test_processes_give_the_same_in_the_same_order(monkeypatch):
    from pronghorn.data.checks import measure as module

    monkeypatch.setattr(module, "ROWS_ALONE", 3)
    monkeypatch.setattr(module, "CHUNK", 4)
    rows = [(i, chat(i), "messages") for i in range(50)]
    rows[20] = (20, {"messages": [{"role": 3}]}, "messages")
    meter = Meter(tiny_tokenizer(), 30, thorough=True)
    alone = list(measure(rows, meter, workers=1))
    assert list(measure(iter(rows), meter, workers=2)) == alone
    assert [tag for tag, _ in alone] == list(range(50)) and alone[20][1].problems[
        0
    ].kind == "template-refuses"


def test_percentiles_and_advice():
    report = report_of(range(1, 1001))
    assert report.percentiles()["50"] == 500 and report.percentiles()["100"] == 1000
    assert report.advice() == (1024, "it holds every row: the longest has 1,000 tokens")
    assert report_of([100] * 9 + [150]).advice()[0] == 192, (
        "a size that holds the longest row, if that is smaller"
    )
    size, why = report_of([100] * 1000 + [9000]).advice()
    assert size == 9024 and "every row" in why
    size, why = report_of([1000] * 5000 + [9000]).advice()
    assert size == 1024 and "cuts 1 of 5,001 rows" in why and "9,024" in why
    size, why = report_of([5000] * 10, context=2048).advice()
    assert size == 2048 and "the model takes no more" in why


def test_padding_with_and_without_packing():
    cut = report_of([10, 90, 50, 50], batch=2).at(100)
    assert cut.padding == pytest.approx(1 - 200 / (180 + 100))
    assert cut.sequences == 2 and cut.padding_packed == 0
    cut = report_of([10, 90, 150], batch=3).at(100)
    assert (cut.rows_cut, cut.tokens_lost) == (1, 50)
    assert cut.padding == pytest.approx(1 - 200 / 300)


def test_a_file_without_measurable_rows(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(RowsUnreadable, match="unknown-format"):
        stats(tmp_path / "r.jsonl", tiny_tokenizer())
