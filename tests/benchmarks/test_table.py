"""Ratios, parity of the first loss, tables and CSV."""

from __future__ import annotations

import csv
from typing import Any

from benchmarks.registry import WORKLOADS
from benchmarks.run import failure_reason
from benchmarks.table import append_csv, plain_table, rate, report


def result(side: str, speed: float, loss: float = 6.0) -> dict[str, Any]:
    return {
        "workload": "tiny", "side": side, "label": "exact", "tokens_per_s": speed, "ms_per_step": 1.5,
        "peak_allocated_gib": 1.0, "peak_reserved_gib": 2.0, "first_step_s": 3.0, "first_loss": loss,
        "mean_loss": 5.5, "hardware": "a GPU", "versions": {"torch": "2.11", "trl": "1.15"},
    }  # fmt: skip


def test_ratios_are_against_unsloths_default() -> None:
    rows = [result("hf", 50.0), result("unsloth", 100.0), result("pronghorn-all", 150.0)]
    rate(rows)
    assert [row["ratio"] for row in rows] == [0.5, 1.0, 1.5]
    assert {row["parity"] for row in rows} == {"same loss"}


def test_rounds_use_the_median_of_the_baseline() -> None:
    rows = [result("unsloth", speed) for speed in (90.0, 100.0, 500.0)]
    rate(rows)
    assert [row["ratio"] for row in rows] == [0.9, 1.0, 5.0]


def test_no_ratio_without_a_baseline_or_on_another_loss() -> None:
    rows = [result("hf", 50.0), result("pronghorn-all", 150.0)]
    rate(rows)
    assert [row["ratio"] for row in rows] == [None, None]
    rows = [result("hf", 50.0), result("unsloth", 100.0), result("pronghorn-all", 150.0, loss=6.5)]
    rate(rows)
    assert rows[2]["ratio"] is None
    text = report(WORKLOADS["tiny"], rows)
    assert "no claim" in text
    assert "pronghorn-all: its first loss differs" in text


def test_a_nan_loss_is_a_different_loss() -> None:
    rows = [result("hf", 50.0), result("unsloth", 100.0), result("pronghorn-all", 150.0, loss=float("nan"))]
    rate(rows)
    assert rows[2]["parity"] == "DIFFERENT LOSS"


def test_failed_sides_keep_their_line() -> None:
    rows = [
        {"workload": "tiny", "side": "liger", "label": "exact", "error": "ImportError: no liger"},
        result("hf", 5.0),
    ]
    rate(rows)
    text = report(WORKLOADS["tiny"], rows)
    assert "liger: ImportError: no liger" in text
    assert "a GPU" in text.splitlines()[0]


def test_table_is_aligned() -> None:
    lines = plain_table(("a", "bb"), [["long name", "1"], ["x", "1000"]]).splitlines()
    assert lines[0].endswith("  bb")
    assert lines[2] == "long name     1"
    assert lines[3] == "x          1000"


def test_csv_appends_below_one_header(tmp_path) -> None:
    rows = [
        result("hf", 50.0),
        {"workload": "tiny", "side": "liger", "label": "exact", "error": "no, thanks"},
    ]
    rate(rows)
    path = tmp_path / "folder" / "results.csv"
    append_csv(path, rows)
    append_csv(path, rows)
    with path.open() as file:
        read = list(csv.DictReader(file))
    assert [row["side"] for row in read] == ["hf", "liger"] * 2
    assert read[0]["versions"] == "torch=2.11 trl=1.15"
    assert read[1]["error"] == "no, thanks"


def test_failure_reason() -> None:
    assert failure_reason(124, "", 60) == "stopped after 60 s"
    output = "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory\nwarning: bye\n"
    assert failure_reason(1, output, 60) == "exit status 1: torch.OutOfMemoryError: CUDA out of memory"
    assert failure_reason(-9, "", 60) == "exit status -9: no output"
