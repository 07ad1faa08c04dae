"""A search by one process and by several, and what is said of the two."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import memory_watch, search
from benchmarks.memory_watch import MemoryWatch
from benchmarks.models import write_checkpoint
from benchmarks.registry import find_workload
from benchmarks.side import RESULT_PREFIX


def test_the_trials_are_as_many_as_asked_for() -> None:
    for count in (1, 2, 5, 12):
        axes = search.axes(count)
        assert len(axes["learning_rate"]) * len(axes["r"]) == count
        assert len(set(axes["learning_rate"])) == len(axes["learning_rate"])
    assert search.axes(4) == {"learning_rate": [5e-5, 2e-3], "r": [8, 16]}
    assert search.ways_of(3, 0) == search.ways_of(3, 1) == [("one", 1), ("workers", 3)]
    assert search.ways_of(3, 2)[2] == ("gpus", 6)
    assert search.later([5.0, 6.0, 8.0, 10.0], 2) == 2.0 and search.later([5.0], 1) is None


def test_one_process_searches(tmp_path: Path, capsys) -> None:
    checkpoint = write_checkpoint("tiny", tmp_path / "tiny")
    given = {"way": "gpus", "workers": 1, "trials": 2, "steps": 2}
    row = search.measure(find_workload("tiny@1layers"), checkpoint, **given)
    assert row["done"] == 2 and row["tokens_per_s"] > 0 and row["s_per_trial"] > 0
    assert len(row["losses"]) == 2 and all(5 < loss < 7 for loss in row["losses"].values())
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gpus, trial ")]
    assert len(said) == 2 and "r 16: loss" in said[1]


def test_ways_are_compared_and_one_that_fails_ends_no_other(tmp_path: Path, monkeypatch, capsys) -> None:
    def process(module: str, arguments: list[str], *, tell, **_: Any) -> tuple[int, str]:
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        way, workers = given["--way"], int(given["--workers"])
        tell(f"{way}, trial 0: loss 5")
        if way == "gpus":
            return 124, ""
        losses = {"a": 5.0, "b": 5.5 if way == "one" else 5.25}
        row = {
            "seconds": 60.0 / workers,
            "done": 2,
            "tokens_per_s": 1e3,
            "s_per_trial": None,
            "losses": losses,
        }
        return 0, RESULT_PREFIX + json.dumps(row)

    monkeypatch.setattr(search, "run_module", process)
    monkeypatch.setattr(search, "checkpoint_folder", lambda *_: tmp_path)
    monkeypatch.setattr(search, "ways_of", lambda workers, _: [("one", 1), ("gpus", 4), ("workers", workers)])
    assert search.main(["--workload", "tiny", "--workers", "2", "--json"]) == 1
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [row.get("losses_differ") for row in rows] == [0.0, None, 0.25]
    assert "stopped after 600 s" in rows[1]["error"] and out.count("trial 0: loss 5") == 3
    table = out[out.rindex("way ") :]
    assert "2.00x" in table and "differ by 2.5e-01" in table and "failed" in table


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what processes hold")
def test_memory_of_processes_below_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(memory_watch, "gpu_bytes", lambda: None)
    code = "import time; held = b'x' * (64 << 20); print(len(held), flush=True); time.sleep(60)"
    with MemoryWatch() as memory:
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline()
            time.sleep(3 * memory_watch.EVERY)
            process.kill()
    assert memory.peak_gib is not None and memory.peak_gib > 64 / 1024


def test_memory_of_gpus_is_what_is_held_more_than_before(monkeypatch) -> None:
    held = iter([5 << 30, 5 << 30, *[8 << 30] * 1000])
    monkeypatch.setattr(memory_watch, "gpu_bytes", lambda: next(held))
    monkeypatch.setattr(memory_watch, "EVERY", 0.01)
    with MemoryWatch() as memory:
        time.sleep(0.2)
    assert memory.peak_gib == 3.0
