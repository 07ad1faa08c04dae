"""The picture of a results file."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import parity, plot
from benchmarks.registry import LEVELS
from benchmarks.table import append_csv, rate


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Three sides and a ceiling; FP8's gates were not run."""
    path = tmp_path / "parity.json"
    parity.record("exact", {f"llama tiny bf16 {level}": True for level in LEVELS}, path, "a GPU")
    rows = [
        {"workload": "tiny", "side": "ceiling, exact", "label": "exact", "tokens_per_s": 400.0, "ceiling": True},
        *(
            {"workload": "tiny", "side": side, "label": "exact", "tokens_per_s": speed, "ms_per_step": 5.0,
             "ms_p10": 4.0, "ms_p90": 6.0, "peak_allocated_gib": 1.0, "peak_reserved_gib": gib, "first_step_s": 3.0,
             "first_loss": 6.0, "mean_loss": 5.5, "hardware": "a GPU"}
            for side, speed, gib in
            (("unsloth", 100.0, 2.0), ("pronghorn-all", 300.0, 4.0), ("pronghorn-fp8", 350.0, 4.0))
        ),
    ]  # fmt: skip
    rate(rows, path)
    append_csv(tmp_path / "results.csv", rows)
    return tmp_path / "results.csv"


def test_picture(results: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    assert plot.main([str(results), str(picture), "--title", "A & B"]) == 0
    root = ElementTree.fromstring(picture.read_text())
    space = "{http://www.w3.org/2000/svg}"
    texts = ["".join(node.itertext()) for node in root.iter(f"{space}text")]
    assert "A & B" in texts
    assert "300 (3.00×)" in " ".join(" ".join(texts).split())
    assert "350" in " ".join(texts)
    assert "3.50×" not in " ".join(texts), "no claim without the gates"
    bars = [
        node
        for node in root.iter(f"{space}rect")
        if node.get("class", "").split()[0] in ("ours", "base", "fast")
    ]
    assert len(bars) == 6
    assert sum("hollow" in node.get("class", "") for node in bars) == 1
    (tick, *_) = root.iter(f"{space}line")
    speeds = [bar for bar in bars if bar.get("x") == str(plot.LEFT)]
    share = float(speeds[1].get("width")) / (float(tick.get("x1")) - plot.LEFT)
    assert share == pytest.approx(300 / 400, abs=0.01), "the tick stands at the ceiling"
    view = [float(number) for number in root.get("viewBox", "").split()]
    assert all(float(bar.get("x")) + float(bar.get("width")) < view[2] for bar in bars)


def test_a_file_without_results_is_refused(results: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no result"):
        plot.main([str(results), str(tmp_path / "picture.svg"), "--workloads", "llama8b-lora"])


def test_the_committed_results_can_be_drawn(tmp_path: Path) -> None:
    """The newest file that the repository has."""
    folder = Path(plot.__file__).parent / "results"
    newest = max(folder.glob("20*-h200*.csv"))
    assert plot.main([str(newest), str(tmp_path / "picture.svg")]) == 0
