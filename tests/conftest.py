"""Shared by all tests: the device they run on, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

import pytest
import torch

# Triton reads this when it is first imported; the same kernel tests then run natively or interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
