"""``pronghorn doctor`` as it is typed: facts, then checks, exit status, both forms of output."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from pronghorn.cli import doctor as command
from pronghorn.cli.main import main
from pronghorn.diagnostics import runner
from pronghorn.diagnostics.checks import Check, Result
from pronghorn.diagnostics.registry import CHECKS

SOURCES = str(Path(__file__).resolve().parents[2] / "src")


@pytest.fixture
def fixed(monkeypatch):
    """The command with results that are given, instead of running checks."""

    def give(*results: Result) -> None:
        def run_apart(report, **kwargs):
            for result in results:
                report(result)
            return list(results)

        monkeypatch.setattr(runner, "run_apart", run_apart)

    return give


GOOD = Result("kernels", "RMSNorm", "PASS", "y is right", 0.1)
BAD = Result("machine", "disk", "FAIL", "it is full", 0.2, "free some")
NONE = Result("machine", "pinned memory", "SKIP", "no CUDA GPU", 0.0)


# How much disk and memory the machine of a test has left is no fault of the program.
ROOM = {"disk", "host memory"}


def test_everything_on_this_machine_passes_and_takes_less_than_a_minute():
    """The real thing, in processes of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "pronghorn", "doctor", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCES},
        check=False,
        timeout=200,
    )
    found = json.loads(result.stdout)
    failed = {c["name"]: c["detail"] for c in found["checks"] if c["status"] == "FAIL"}
    assert not {name: detail for name, detail in failed.items() if name not in ROOM}
    assert result.returncode == bool(failed) and found["ok"] == (not failed)
    assert [c["name"] for c in found["checks"]] == [check.name for check in CHECKS]
    assert {"RMSNorm", "LoRA step", "attention 'eager'", "fast_linear_forward"} <= {
        c["name"] for c in found["checks"] if c["status"] == "PASS"
    }
    assert found["hardware"]["device"] in ("cpu", "cuda") and found["packages"]
    # Time of the checks, without the imports that a loaded machine stretches.
    assert sum(c["seconds"] for c in found["checks"]) < 60


def test_failure_is_status_1(fixed, capsys):
    fixed(GOOD, BAD, NONE)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FAIL  disk" in text and "it is full" in text
    assert "1 passed, 1 failed, 1 do not apply here" in text
    assert "--fix-hints" in text and "free some" not in text


def test_hints(fixed, capsys):
    fixed(GOOD, BAD)
    assert main(["doctor", "--fix-hints"]) == 1
    assert "free some" in capsys.readouterr().out


def test_json_has_facts_and_checks(fixed, capsys):
    fixed(GOOD, BAD)
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"PASS": 1, "FAIL": 1, "SKIP": 0} and found["ok"] is False
    assert found["checks"][1] == BAD.as_dict()
    assert {"python", "packages", "hardware", "paths"} <= set(found)


def test_success_is_status_0(fixed, capsys):
    fixed(GOOD, NONE)
    assert main(["doctor"]) == 0
    assert "transformers" in capsys.readouterr().out


def test_facts_alone_run_nothing(monkeypatch, capsys):
    def never(**kwargs):
        raise AssertionError("a check ran")

    monkeypatch.setattr(runner, "run_apart", never)
    assert main(["doctor", "--facts"]) == 0
    assert "compute dtype" in capsys.readouterr().out
    assert main(["doctor", "--facts", "--json"]) == 0
    assert "checks" not in json.loads(capsys.readouterr().out)


def test_a_broken_kernel_is_status_1(monkeypatch, capsys):
    """Wrong numbers out of one kernel: its check fails, others go on."""
    from pronghorn.kernels import glu

    right = glu.glu_forward

    def wrong(gate, *args, **kwargs):
        out = right(gate, *args, **kwargs)
        out[-1, -1] += 0.1
        return out

    monkeypatch.setattr(glu, "glu_forward", wrong)
    chosen = [c for c in CHECKS if c.name in ("RMSNorm", "gated linear unit", "dropout")]
    monkeypatch.setattr(runner, "run_apart", lambda report, **kwargs: runner.run_here(chosen, report))
    assert command.run(as_json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert {c["name"]: c["status"] for c in found["checks"]} == {
        "RMSNorm": "PASS",
        "gated linear unit": "FAIL",
        "dropout": "PASS",
    }
    assert "silu in " in found["checks"][1]["detail"] and found["checks"][1]["fix"]


@pytest.mark.parametrize(
    "typed,meant",
    [
        ([], ["doctor"]),
        (["--facts", "--json"], ["doctor", "--facts", "--json"]),
        (["doctor", "--facts"], ["doctor", "--facts"]),
        (["chat", "model"], ["chat", "model"]),
    ],
)
def test_python_dash_m(monkeypatch, typed, meant):
    given = []
    monkeypatch.setattr("pronghorn.cli.main.main", lambda arguments: given.append(arguments) or 0)
    monkeypatch.setattr(sys, "argv", ["pronghorn", *typed])
    with pytest.raises(SystemExit):
        runpy.run_module("pronghorn", run_name="__main__")
    assert given == [meant]


def test_names_are_distinct_and_their_functions_exist():
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert all(callable(check.function()) for check in CHECKS)
    assert all(isinstance(check, Check) for check in CHECKS)
