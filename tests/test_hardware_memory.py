"""What torch can have of a GPU's memory."""

from __future__ import annotations

import pytest

from pronghorn.hardware import GpuMemory

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "reserved", "allowed", "reach"),
    [
        (70, 10, None, 80),
        (70, 10, 23, 23),
        (5, 10, 23, 15),
    ],
    ids=["all that is free", "a limit for the process", "a limit that others leave no room for"],
)
def test_what_is_within_reach(free: int, reserved: int, allowed: int | None, reach: int) -> None:
    memory = GpuMemory(80 * GIB, free * GIB, reserved * GIB, allowed and allowed * GIB)
    assert memory.within_reach == reach * GIB
    assert memory.others == (80 - free - reserved) * GIB
