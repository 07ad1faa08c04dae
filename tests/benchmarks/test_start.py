"""Stages of a process's start, on the CPU."""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page_cache, start
from benchmarks.models import write_checkpoint
from benchmarks.side import RESULT_PREFIX


def test_stages_add_up_to_the_first_step() -> None:
    marks = start.Marks(0.0)
    marks.ends = {"imports": 5.0, "weights": 9.0, "adapters": 9.5, "step 0": 11.0}
    marks.ends |= {"step 1": 14.0, "step 2": 14.5, "step 3": 16.0, "step 4": 16.5}
    stages = marks.stages(4)
    assert stages == {
        "imports": 5.0, "weights": 4.0, "adapters": 0.5, "trainer": 1.5, "recording": 2.5, "step": 0.5,
    }  # fmt: skip
    assert sum(stages.values()) == marks.ends["step 1"] and tuple(stages) == start.STAGES
    marks.ends |= {"step 2": 24.5}
    assert (marks.stages(2)["recording"], marks.stages(2)["step"]) == (0.0, 3.0), "no stage is below nothing"


@pytest.mark.parametrize("side", ["hf", "pronghorn"])
def test_a_side_is_timed_from_its_start(side: str, tmp_path: Path, capsys) -> None:
    checkpoint = write_checkpoint("tiny", tmp_path / "tiny")
    arguments = ["--workload", "tiny", "--side", side, "--checkpoint", str(checkpoint), "--steps", "2"]
    assert start.main([*arguments, "--started", str(time.time() - 3.0)]) == 0
    out = capsys.readouterr().out
    row = json.loads(out[out.index(RESULT_PREFIX) + len(RESULT_PREFIX) :])
    assert row["stages"]["imports"] > 3.0 and row["total_s"] > 3.0 and row["first_loss"] > 5.0
    assert row["stages"]["weights"] > 0 and row["stages"]["step"] > 0
    assert abs(sum(row["stages"].values()) - row["total_s"]) < 0.5


def test_three_states_of_each_side_and_a_failure_ends_no_other(tmp_path: Path, monkeypatch, capsys) -> None:
    checkpoint, caches = write_checkpoint("tiny", tmp_path / "checkpoints" / "tiny"), []

    def process(module: str, arguments: list[str], *, work: Path, library: str, **_: Any) -> tuple[int, str]:
        assert "--notebook" in arguments
        caches.append((library, sorted(path.name for path in work.iterdir())))
        (work / "compiled").touch()
        if library == "unsloth":
            return 1, "Traceback\nModuleNotFoundError: No module named 'unsloth'"
        row = {"stages": dict.fromkeys(start.STAGES, 1.0), "total_s": 6.0, "compiled": 7}
        return 0, f"noise\n{RESULT_PREFIX}{json.dumps(row)}"

    monkeypatch.setattr(start, "run_module", process)
    monkeypatch.setattr(start, "checkpoint_folder", lambda *_: checkpoint)
    arguments = [
        "--workload",
        "tiny",
        "--sides",
        "unsloth,pronghorn",
        "--rounds",
        "2",
        "--json",
        "--notebook",
    ]
    assert start.main(arguments) == 1
    assert [library for library, _ in caches] == (["unsloth"] * 3 + ["pronghorn"] * 3) * 2
    assert [files for _, files in caches] == [[], ["compiled"], ["compiled"]] * 4, "first: without caches"
    out = capsys.readouterr().out
    assert out.count("No module named 'unsloth'") == 6 + 6 + 6, "as a line, as JSON, and below the table"
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [row["state"] for row in rows[3:6]] == list(start.STATES)
    assert rows[5]["cached"] in (1.0, None)
    assert "pronghorn   warm     6.00" in out
    assert out.count("; 7 modules compiled to bytecode)") == 6


def test_modules_without_bytecode_are_counted(tmp_path: Path, monkeypatch) -> None:
    before, began = start.compiled_since(0.0), time.time()
    older = start.compiled_since(began + 1000.0)
    (tmp_path / "kept.py").touch()
    (tmp_path / "unkept.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name, unwritten in (("kept", False), ("unkept", True)):
        monkeypatch.setattr(sys, "dont_write_bytecode", unwritten)
        import_module(name)
    assert start.compiled_since(0.0) == before + 2
    assert start.compiled_since(began + 1000.0) == older + 1, "what was written before is not counted"
    for name in ("kept", "unkept"):
        del sys.modules[name]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its page cache")
def test_a_checkpoint_leaves_the_page_cache_and_comes_back(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(1 << 20))
    (tmp_path / "empty").touch()
    page_cache.evict(tmp_path)
    dropped = page_cache.cached_share(tmp_path)
    page_cache.warm(tmp_path)
    assert page_cache.cached_share(tmp_path) == 1.0
    assert dropped is not None and (dropped == 0.0 or dropped == 1.0), "a file system in memory keeps all"


def test_one_step_has_nothing_to_be_compared_with(capsys) -> None:
    with pytest.raises(SystemExit):
        start.parse(["--steps", "1"])
    assert "two at least" in capsys.readouterr().err
