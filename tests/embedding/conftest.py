"""Exact comparisons need the CPU, also on a machine with a GPU."""

from __future__ import annotations

import pytest

from pronghorn import hardware
from pronghorn.embedding import model
from pronghorn.loading import fast


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fast, model):
        monkeypatch.setattr(module, "probe", hardware._cpu_hardware)
