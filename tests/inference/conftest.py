"""What several of the engine's tests ask for."""

from __future__ import annotations

import pytest

from pronghorn.inference import engine as engine_module
from pronghorn.inference.captured import CapturedRunner


@pytest.fixture
def captured(monkeypatch):
    """Engines made from here on decode in recorded steps, on a CPU too."""
    monkeypatch.setattr(engine_module, "_runner", CapturedRunner)
