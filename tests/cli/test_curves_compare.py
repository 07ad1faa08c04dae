"""The commands that read what runs left."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from pronghorn.cli.main import main
from tests.experiments.test_compare_runs import run


@pytest.fixture
def runs(tmp_path):
    places = []
    for name, record in (("a", run("a", 1e-4, 1.5)), ("b", run("b", 2e-4, 1.4, best_at=40))):
        (tmp_path / name).mkdir()
        record.save(tmp_path / name)
        places.append(str(tmp_path / name))
    return places


def test_curves(runs, capsys):
    assert main(["curves", runs[1]]) == 0
    out = capsys.readouterr().out
    assert out.startswith("b: 100 steps, 100 losses, 100 gradient norms, 5 evaluations")
    assert "warning: overfitting, steps 40 to 100" in out and "The weights of step 40 are the best" in out
    assert main(["curves", runs[1], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert (found[0]["kind"], found[0]["best_step"]) == ("overfitting", 40)


def test_curves_of_a_healthy_run(tmp_path, capsys):
    record = run("fine", 1e-4, 1.5, best_at=100)
    # A loss that goes on falling, as that of the other runs does not.
    record.step_losses = [1.5 + 1.5 / math.sqrt(step) for step in record.steps]
    record.save(tmp_path)
    assert main(["curves", str(tmp_path)]) == 0
    assert "Nothing is wrong that a curve would show." in capsys.readouterr().out


def test_compare(runs, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["compare", *runs, "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "learning_rate  0.0001  0.0002" in out and "evaluation loss, best" in out
    assert "b: overfitting: The evaluation loss rose" in out and f"Page: {page}" in out
    assert "<figure" in page.read_text()
    assert main(["compare", *runs, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["runs"] == ["a", "b"] and said["settings"] == {"learning_rate": ["0.0001", "0.0002"]}


def test_what_cannot_be_compared(runs, tmp_path, capsys):
    assert main(["compare", runs[0]]) == 2
    assert main(["compare", runs[0], str(tmp_path / "absent")]) == 2
    assert main(["compare", *runs, "--html", str(tmp_path / "no" / "page.html")]) == 2
    said = capsys.readouterr().err
    assert "PH402" in said or "name two runs" in said
    assert "PH703" in said and "cannot be written" in said


def test_neither_loads_torch(runs):
    """They answer at once, on a machine without it, too."""
    for command in (["curves", runs[0]], ["compare", *runs]):
        code = (
            "import sys; from pronghorn.cli.main import main; "
            f"main({command!r}); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
        )
        known = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, env=known).returncode == 0
