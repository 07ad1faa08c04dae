"""Checks that end in every way there is, for the runner's tests."""

from __future__ import annotations

import ctypes
import os
import sys
import time

from pronghorn.diagnostics.checks import Check, NotHere, Unsound


def good() -> str:
    print("a library prints something")
    return "fine"


def unsound() -> str:
    raise Unsound("the numbers are wrong", "another card")


def not_here() -> str:
    raise NotHere("no such thing")


def raises() -> str:
    return str(1 / 0)


def crashes() -> str:
    ctypes.string_at(0)
    return "still here"


def leaves() -> str:
    print("last words", file=sys.stderr, flush=True)
    os._exit(7)


def hangs() -> str:
    time.sleep(600)
    return "awake"


def _checks(*names: str) -> list[Check]:
    return [Check("group", name, f"tests.diagnostics.broken_checks:{name}") for name in names]


CHECKS = [
    *_checks("good", "crashes", "unsound", "leaves", "not_here", "raises"),
    Check("group", "missing", "tests.diagnostics.no_such_module:check"),
    Check("other", "after", "tests.diagnostics.broken_checks:good"),
]
SLOW = _checks("good", "hangs", "raises")


def loses_the_gpu() -> str:
    """As an illegal memory access does: the process goes on, its GPU does not."""
    from pronghorn.diagnostics import worker

    worker.device_lost = lambda: True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def process_number() -> str:
    return str(os.getpid())


LOSING = [
    Check("group", "before", "tests.diagnostics.broken_checks:process_number"),
    *_checks("loses_the_gpu"),
    Check("group", "after it", "tests.diagnostics.broken_checks:process_number"),
]
