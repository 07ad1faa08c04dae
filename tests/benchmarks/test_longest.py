"""The search for the longest row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import longest, run
from benchmarks.longest import Attempt, is_out_of_memory, search, table
from benchmarks.models import write_checkpoint
from benchmarks.side import RESULT_PREFIX


def lengths_tried(limit: int, first: int = 16384, most: int = 1 << 20, resolution: float = 0.05) -> list[int]:
    def attempt(length: int) -> Attempt:
        return Attempt(length, error="" if length <= limit else "out of memory")

    return [a.length for a in search(attempt, first, most, resolution, time.time() + 60)]


@pytest.mark.parametrize("limit", [3000, 16384, 70_000, 333_333, 1 << 20, 1 << 22])
def test_search_ends_near_the_limit(limit: int) -> None:
    tried = lengths_tried(limit)
    best = max(length for length in tried if length <= limit)
    assert best <= limit
    assert best == 1 << 20 or limit - best <= max(1024, 0.05 * best) + 1024
    assert len(tried) < 14
    assert len(set(tried)) == len(tried)


def test_search_gives_up_where_nothing_fits_and_in_time() -> None:
    assert lengths_tried(0) == [16384, 8192, 4096, 2048, 1024]
    assert list(search(lambda length: Attempt(length), 1024, 2048, 0.1, time.time() - 1)) == []


def test_out_of_memory_is_told_from_mistakes() -> None:
    wrapped = ValueError("the step failed")
    wrapped.__cause__ = RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    assert is_out_of_memory(wrapped)
    assert not is_out_of_memory(ValueError("no such file"))


def test_table_compares_within_a_cap() -> None:
    def row(side: str, cap: float, length: int) -> dict:
        attempts = [{"length": length, "step_s": 2.5, "reserved_gib": 20.0, "error": ""}]
        return {"side": side, "cap_gib": cap, "longest": length, "attempts": attempts}

    text = table(
        [row("unsloth", 24, 65536), row("pronghorn-offload", 24, 262144), row("pronghorn-offload", 80, 1)]
    )
    lines = text.splitlines()
    assert "4.00x" in lines[3]
    assert "x" not in lines[4].replace("offload", "")
    assert "256k 2.5" in lines[3]


def test_two_lengths_train_in_one_process(tmp_path, capsys) -> None:
    """The real path on the CPU, where nothing runs out: up to the longest row asked for."""
    checkpoint = write_checkpoint("tiny", tmp_path / "tiny")
    arguments = ["--workload", "tiny", "--side", "pronghorn-none", "--checkpoint", str(checkpoint)]
    assert longest.main([*arguments, "--first", "64", "--most", "128", "--seconds", "60"]) == 0
    out = capsys.readouterr().out
    assert '"longest": 128' in out
    assert "pronghorn-none 64 tokens" in out


def test_lengths_that_are_named_may_take_one_step_each(tmp_path, capsys) -> None:
    checkpoint = write_checkpoint("tiny", tmp_path / "tiny")
    arguments = ["--workload", "tiny", "--side", "pronghorn-none", "--checkpoint", str(checkpoint)]
    assert longest.main([*arguments, "--lengths", "96,64", "--steps", "1"]) == 0
    out = capsys.readouterr().out
    attempts = json.loads(out[out.index(RESULT_PREFIX) + len(RESULT_PREFIX) :])["attempts"]
    assert [attempt["length"] for attempt in attempts] == [96, 64]
    assert all(attempt["step_s"] > 0 and not attempt["error"] for attempt in attempts)


def test_a_length_that_fails_ends_no_other_and_what_is_said_comes_at_once(
    monkeypatch, tmp_path, capsys
) -> None:
    """Each length in a process of its own, of which one prints a row, one dies and one takes too long."""
    asked = []

    def process(module: str, arguments: list[str], *, tell, **options) -> tuple[int, str]:
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        asked.append((given["--side"], given["--workload"], given["--lengths"]))
        length = int(given["--lengths"])
        lines = [
            f"{given['--side']} {length} tokens: wants 1.00 GiB",
            "noise",
            "pronghorn: memory plan for 7 GiB",
        ]
        for line in lines:
            tell(line)
        if length > 96:
            return (124 if length > 1024 else 1), "Killed"
        attempt = {"length": length, "step_s": 2.0, "reserved_gib": 1.0, "error": ""}
        row = {"side": given["--side"], "cap_gib": 8.0, "longest": length, "attempts": [attempt]}
        return 0, RESULT_PREFIX + json.dumps(row)

    monkeypatch.setattr(run, "run_module", process)
    monkeypatch.setattr(run, "checkpoint_folder", lambda *_: tmp_path)
    arguments = ["--workload", "tiny", "--layers", "1", "--caps", "8", "--sides", "hf,pronghorn-offload"]
    lengths = ["--lengths", "2048,64,1024,96", "--out", str(tmp_path / "rows.json")]
    assert longest.main([*arguments, *lengths]) == 0
    sides = [side for side, _, _ in asked]
    assert sides == ["hf"] * 4 + ["pronghorn-offload"] * 4 and {w for _, w, _ in asked} == {"tiny@1layers@8"}
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["longest"] for row in rows] == [96, 96] and not any("error" in row for row in rows)
    assert [bool(attempt["error"]) for attempt in rows[0]["attempts"]] == [True, False, True, False]
    out = capsys.readouterr().out
    assert "hf 2,048 tokens: failed: stopped after" in out and "GiB of host memory are available" in out
    assert "memory plan for 7 GiB" in out and "noise" not in out
    assert longest.main([*arguments, "--lengths", "1024"]) == 1, "none got through"


def test_what_a_row_wants_of_the_host_is_said_before_it_is_trained(tmp_path, capsys) -> None:
    checkpoint = write_checkpoint("tiny", tmp_path / "tiny")
    arguments = ["--workload", "tiny", "--side", "pronghorn-offload", "--checkpoint", str(checkpoint)]
    assert longest.main([*arguments, "--lengths", "64", "--steps", "1"]) == 0
    wants, trained = capsys.readouterr().out.splitlines()[:2]
    assert wants.startswith("pronghorn-offload 64 tokens: wants 0.00 GiB of pinned host memory")
    assert "s a step" in trained


def test_a_process_is_listened_to_while_it_runs(tmp_path) -> None:
    heard: list[str] = []
    status, output = run.run_module("this", [], work=tmp_path, library="hf", timeout=60, tell=heard.append)
    assert status == 0 and heard == output.splitlines() and len(heard) > 10
    waits = ["-n1", "-r1", "import time; print('begun', flush=True); time.sleep(60)"]
    status, _ = run.run_module("timeit", waits, work=tmp_path, library="hf", timeout=2, tell=heard.append)
    assert status == 124 and heard[-1] == "begun"


def test_whoever_is_asked_to_end_ends_its_processes_first(tmp_path) -> None:
    """As `timeout` does with a command that takes too long: nothing stays behind on the GPU."""
    waits = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = (
        "import sys; from pathlib import Path; from benchmarks.run import run_module\n"
        f"run_module('timeit', ['-n1', '-r1', {waits!r}], work=Path(sys.argv[1]), library='hf', timeout=60, tell="
        "lambda line: print(line, flush=True))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=run.REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        inner = int(process.stdout.readline())
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(inner, 0)
