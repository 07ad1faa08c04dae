"""Whatever a check does, it gets one result and the next one runs."""

from __future__ import annotations

import time

import pytest

from pronghorn.diagnostics import runner
from pronghorn.diagnostics.checks import perform
from tests.diagnostics import broken_checks

REGISTRY = "tests.diagnostics.broken_checks:"


@pytest.mark.parametrize("processes", [1, 2])
def test_every_ending(processes):
    told = []
    results = runner.run_apart(REGISTRY + "CHECKS", told.append, processes=processes)
    assert [r.name for r in results] == [c.name for c in broken_checks.CHECKS]
    assert sorted(r.name for r in told) == sorted(r.name for r in results)
    found = {r.name: (r.status, r.detail) for r in results}
    assert found["good"] == ("PASS", "fine") and found["after"] == ("PASS", "fine")
    assert found["crashes"][0] == "FAIL" and "SIGSEGV" in found["crashes"][1]
    assert found["unsound"] == ("FAIL", "the numbers are wrong")
    assert found["leaves"][0] == "FAIL"
    assert "status 7" in found["leaves"][1] and "last words" in found["leaves"][1]
    assert found["not_here"] == ("SKIP", "no such thing")
    assert found["raises"] == ("FAIL", "ZeroDivisionError: division by zero")
    assert found["missing"][0] == "FAIL" and "no_such_module" in found["missing"][1]
    assert next(r.fix for r in results if r.name == "unsound") == "another card"


def test_a_check_that_hangs_is_stopped():
    began = time.monotonic()
    results = runner.run_apart(REGISTRY + "SLOW", limit=5.0)
    assert [r.status for r in results] == ["PASS", "FAIL", "FAIL"]
    assert "not done after 5 s" in results[1].detail and "division" in results[2].detail
    assert time.monotonic() - began < 60


def test_a_lost_gpu_is_left_to_a_new_process():
    before, lost, after = runner.run_apart(REGISTRY + "LOSING")
    assert (before.status, lost.status, after.status) == ("PASS", "FAIL", "PASS")
    assert before.detail != after.detail
    assert "CUDA_LAUNCH_BLOCKING" in lost.fix


def test_a_reader_that_leaves_ends_the_rest():
    def leaving(result):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        runner.run_apart(REGISTRY + "SLOW", leaving)


def test_an_interrupt_is_no_result():
    def interrupted() -> str:
        raise KeyboardInterrupt

    check = broken_checks.CHECKS[0]
    broken_checks.interrupted = interrupted
    with pytest.raises(KeyboardInterrupt):
        perform(type(check)("group", "interrupted", "tests.diagnostics.broken_checks:interrupted"))


def test_lanes_hold_every_check_once():
    from pronghorn.diagnostics.registry import CHECKS

    for processes in (1, 2, 3, 9):
        lanes = runner._lanes(CHECKS, processes)
        assert len(lanes) <= processes
        assert sorted(c.name for lane in lanes for c in lane) == sorted(c.name for c in CHECKS)
    assert runner._lanes(CHECKS, 1) == [CHECKS]
