"""What answers are compared by: sides on the CPU, the table, the file."""

from __future__ import annotations

import csv

import pytest

from benchmarks import generate
from benchmarks.models import write_checkpoint


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    checkpoint = write_checkpoint("tiny", tmp_path_factory.mktemp("checkpoint"))
    rows = []
    for side in ("hf", "pronghorn"):
        model = generate.load(side, checkpoint, 96, four_bit=False, adapter=True)
        for count, prompt in ((2, 16), (1, 70)):
            rows.append({"side": side, **generate.measure(model, count, prompt, 5, repeats=1)})
    generate.compare(rows)
    return rows


def test_sides_answer_alike(results) -> None:
    # bf16 rounds in other places, which near equal logits of random weights may show.
    assert all(row["agree"] >= 0.5 and row["decode_per_s"] > 0 for row in results)
    assert [row["agree"] for row in results[:2]] == [1.0, 1.0]
    assert all(len(row["tokens"]) == row["rows"] for row in results)


def test_a_side_that_fails_says_why_and_has_no_ratio(results) -> None:
    failed = {"side": "hf", "rows": 2, "prompt": 16, "error": "exit status 1: no such thing"}
    table = generate.report([failed, *results[2:]]).splitlines()
    assert any("no such thing" in line and " hf " in line for line in table)
    assert not any("1.00x" in line for line in table)
    assert "1.00x" in generate.report(results)


def test_rows_are_appended_to_a_file(results, tmp_path) -> None:
    path = tmp_path / "new" / "generate.csv"
    generate.append_csv(path, results[:1])
    generate.append_csv(path, results[1:])
    rows = list(csv.DictReader(path.open()))
    assert [(row["side"], row["rows"], row["prompt"]) for row in rows] == [
        ("hf", "2", "16"), ("hf", "1", "70"), ("pronghorn", "2", "16"), ("pronghorn", "1", "70"),
    ]  # fmt: skip
