"""The scripts behind the Makefile: what an environment lacks is found by name; a recording's overdrawn lines vanish."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_requirements_follow_extras_of_extras():
    setup = script("setup_venv")
    names = setup.requirements(["dev"])
    for name in ("torch", "pytest", "ruff", "gguf"):
        assert sum(requirement.startswith((name + ">", name + "~")) for requirement in names)
    assert not any(requirement.startswith("pronghorn") for requirement in names)
    assert not any(requirement.startswith("pytest") for requirement in setup.requirements([]))


def test_missing_and_outdated_packages_are_named():
    pytest.importorskip("pip")
    wanted = ["absent-package>=1", "torch>=900", "torch>=1", "absent-too; python_version < '3'"]
    shown = subprocess.run(
        [sys.executable, "-c", script("setup_venv").FIND_MISSING, *wanted],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    absent, outdated = json.loads(shown)
    assert absent == "absent-package>=1"
    assert outdated.startswith("torch>=900 (version ")


def test_drawn_over_lines_are_as_they_stand_last():
    last_state = script("picture").last_state
    recording = "one\r\nbar 1/2\r\x1b[2Kbar 2/2\r\x1b[2Kstep 1\r\ntwo\r\nthree\r\x1b[1A\x1b[2Kdone"
    assert last_state(recording) == ["one", "step 1", "done", "three"]
