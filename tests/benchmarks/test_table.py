"""Ratios, parity of the first loss, tables and CSV."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from benchmarks import parity
from benchmarks.registry import LEVELS, WORKLOADS, find_side
from benchmarks.run import failure_reason
from benchmarks.table import append_csv, checked_state, plain_table, rate, report, whole_report


@pytest.fixture
def green(tmp_path) -> Path:
    """A parity file in which everything passed on "a GPU"."""
    path = tmp_path / "parity.json"
    cases = {f"llama tiny {precision} {level}": True for precision in ("bf16", "nf4") for level in LEVELS}
    parity.record("exact", cases, path, "a GPU")
    return path


def result(side: str, speed: float, loss: float = 6.0) -> dict[str, Any]:
    return {
        "workload": "tiny", "side": side, "label": "exact", "tokens_per_s": speed, "ms_per_step": 1.5,
        "peak_allocated_gib": 1.0, "peak_reserved_gib": 2.0, "first_step_s": 3.0, "first_loss": loss,
        "mean_loss": 5.5, "hardware": "a GPU", "versions": {"torch": "2.11", "trl": "1.15"},
    }  # fmt: skip


def test_ratios_are_against_unsloths_default(green: Path) -> None:
    rows = [result("hf", 50.0), result("unsloth", 100.0), result("pronghorn-all", 150.0)]
    rate(rows, green)
    assert [row["ratio"] for row in rows] == [0.5, 1.0, 1.5]
    assert [row["parity"] for row in rows] == ["same loss", "same loss", "parity green"]


def test_no_ratio_without_a_green_check(tmp_path: Path) -> None:
    rows = [result("unsloth", 100.0), result("pronghorn-all", 150.0)]
    rate(rows, tmp_path / "none.json")
    assert [row["ratio"] for row in rows] == [1.0, None]
    text = report(WORKLOADS["tiny"], rows)
    assert "parity not run" in text
    assert "no speed is claimed" in text
    assert "1.50x" not in text
    path = tmp_path / "parity.json"
    parity.record("exact", {"llama tiny bf16 all": False, "llama tiny bf16 none": True}, path, "a GPU")
    rate(rows, path)
    assert (rows[1]["parity"], rows[1]["ratio"]) == ("parity red", None)
    parity.record("exact", {"llama tiny bf16 all": True}, path, "a GPU")
    rate(rows, path)
    assert (rows[1]["parity"], rows[1]["ratio"]) == ("parity green", 1.5)


def test_what_a_side_needs_checked(green: Path, tmp_path: Path) -> None:
    llama, qwen = WORKLOADS["llama8b-qlora"], WORKLOADS["qwen1.5b-lora"]
    assert checked_state(find_side("pronghorn-all"), llama, "a GPU", green) == "green"
    assert checked_state(find_side("pronghorn"), llama, "a GPU", green) == "green"
    assert checked_state(find_side("pronghorn-all"), qwen, "a GPU", green) == "not run", "another family"
    assert checked_state(find_side("pronghorn-all"), llama, "another GPU", green) == "not run"
    assert checked_state(find_side("pronghorn-fp8-all"), llama, "a GPU", green) == "not run", (
        "gates of its own"
    )
    lora = WORKLOADS["llama8b-lora"]
    gates = ("gradient cosine, fp8 to fp32", "KL(fp32 || fp8) before", "product 8192 x 4096")
    parity.record("fp8", {f"fp8: {gate}": True for gate in gates}, green, "a GPU")
    assert checked_state(find_side("pronghorn-fp8-all"), lora, "a GPU", green) == "not run", "no training"
    parity.record("fp8", {"fp8: held-out loss, paired difference": True}, green, "a GPU")
    assert checked_state(find_side("pronghorn-fp8-all"), lora, "a GPU", green) == "green"
    assert checked_state(find_side("pronghorn-fp8-17.5GiB"), lora, "a GPU", green) == "green"
    assert checked_state(find_side("pronghorn-fp8-all"), llama, "a GPU", green) == "not run", "4-bit storage"
    assert checked_state(find_side("pronghorn-fp8-skip0"), lora, "a GPU", green) == "not run"
    assert checked_state(find_side("pronghorn-fp8-mixed"), lora, "a GPU", green) == "not run"
    parity.record("fp8", {"fp8: product 8192 x 4096": False}, green, "a GPU")
    assert checked_state(find_side("pronghorn-fp8-all"), lora, "a GPU", green) == "red"
    one = tmp_path / "one.json"
    parity.record(
        "exact", {"llama tiny nf4 all": True, "llama tiny nf4 offload-attention": True}, one, "a GPU"
    )
    assert checked_state(find_side("pronghorn-offload"), llama, "a GPU", one) == "not run", "another level"
    assert checked_state(find_side("pronghorn-6.8GiB"), llama, "a GPU", one) == "not run", (
        "a plan mixes levels"
    )


def test_another_state_of_the_sources_is_not_checked(green: Path, monkeypatch) -> None:
    monkeypatch.setattr(parity, "source_hash", lambda: "0123456789ab")
    assert parity.state("exact", "a GPU", green) == "not run"


def test_the_source_hash_is_of_contents(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = parity.source_hash(tmp_path)
    parity.source_hash.cache_clear()
    (tmp_path / "a.py").write_text("x = 2\n")
    second = parity.source_hash(tmp_path)
    assert second != first
    parity.source_hash.cache_clear()
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "b.py").write_text("x = 3\n")  # no step runs it
    assert parity.source_hash(tmp_path) == second
    parity.source_hash.cache_clear()


def test_shares_of_the_ceiling(green: Path) -> None:
    top = {
        "workload": "tiny",
        "side": "ceiling, exact",
        "label": "exact",
        "tokens_per_s": 200.0,
        "ceiling": True,
    }
    rows = [top, result("unsloth", 100.0), result("pronghorn-all", 150.0)]
    rate(rows, green)
    assert [row.get("of_ceiling") for row in rows] == [None, 0.5, 0.75]
    assert rows[0]["ratio"] == 2.0
    text = whole_report([(WORKLOADS["tiny"], rows)])
    assert "75%" in text
    assert "ceiling, exact" in text
    assert text.splitlines()[2].startswith("tiny: tiny, 2x32 tokens")


def test_rounds_use_the_median_of_the_baseline() -> None:
    rows = [result("unsloth", speed) for speed in (90.0, 100.0, 500.0)]
    rate(rows)
    assert [row["ratio"] for row in rows] == [0.9, 1.0, 5.0]


def test_no_ratio_without_a_baseline_or_on_another_loss(green: Path) -> None:
    rows = [result("hf", 50.0), result("pronghorn-all", 150.0)]
    rate(rows, green)
    assert [row["ratio"] for row in rows] == [None, None]
    rows = [result("hf", 50.0), result("unsloth", 100.0), result("pronghorn-all", 150.0, loss=6.5)]
    rate(rows, green)
    assert rows[2]["ratio"] is None
    text = report(WORKLOADS["tiny"], rows)
    assert "DIFFERENT LOSS" in text
    assert "pronghorn-all: its first loss differs" in text


def test_without_a_gpu_ratios_are_to_the_faster_stock_side(tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    parity.record("exact", {f"llama tiny bf16 {level}": True for level in LEVELS}, path, "CPU")
    rows = [result("hf", 50.0), result("hf-nockpt", 100.0), result("pronghorn-all", 150.0)]
    for row in rows:
        row["hardware"] = "CPU, 2 threads"
    rate(rows, path)
    assert [row["ratio"] for row in rows] == [0.5, 1.0, 1.5]
    assert "ratios are to hf-nockpt" in report(WORKLOADS["tiny"], rows)


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
    path.write_text("side,tokens\n")
    with pytest.raises(SystemExit, match="other columns"):
        append_csv(path, rows)
    assert [row["side"] for row in read] == ["hf", "liger"] * 2
    assert read[0]["versions"] == "torch=2.11 trl=1.15"
    assert read[1]["error"] == "no, thanks"


def test_failure_reason() -> None:
    assert failure_reason(124, "", 60) == "stopped after 60 s"
    output = "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory\nwarning: bye\n"
    assert failure_reason(1, output, 60) == "exit status 1: torch.OutOfMemoryError: CUDA out of memory"
    assert failure_reason(-9, "", 60) == "exit status -9: no output"
