"""Scripts run in this process, on the CPU, with one tiny model in place of every id they name."""

import pytest

from pronghorn import hardware
from pronghorn.loading import fast
from tests.tiny import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny", "llama"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Scripts write below the current folder, and see a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fast, "probe", hardware._cpu_hardware)
