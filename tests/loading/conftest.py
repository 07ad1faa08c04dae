"""Loading and export are tested on the CPU on every machine; tests marked `gpu` are about the GPU."""

import pytest

from pronghorn import hardware
from pronghorn.loading import fast


@pytest.fixture(autouse=True)
def on_cpu(request, monkeypatch):
    """Let loading see a machine without a GPU."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(fast, "probe", hardware._cpu_hardware)
