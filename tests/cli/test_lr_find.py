"""``pronghorn lr-find`` on the file of a training: a rate, a plot, figures, and nothing trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pronghorn.cli.main import main
from tests.tiny import save_tiny

CONFIG = """\
model:
  name: {model}
  max_seq_length: 64
  dtype: float32
  load_in_4bit: false
adapter:
  r: 4
data:
  dataset: {rows}
  held_back: 4
training:
  per_device_train_batch_size: 4
output:
  folder: {out}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"row {n}: ", "completion": "grass " * (n % 5 + 1)}) + "\n"
            for n in range(24)
        )
    )
    path = tmp_path / "run.yaml"
    model = save_tiny(tmp_path / "model", "llama")
    path.write_text(CONFIG.format(model=model, rows=rows, out=tmp_path / "out"))
    return path


def test_a_rate_and_a_scan(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["lr-find", str(config), "--steps", "16", "--lowest", "1e-4", "--scan", "2", "--json"]
    assert main(asked) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    test = found["range_test"]
    assert test["first"] <= test["learning_rate"] <= test["last"] and len(test["rates"]) == len(
        test["losses"]
    )
    rates = [one["rate"] for one in found["scan"]["candidates"]]
    assert (
        len(rates) == 5 and found["learning_rate"] in rates and found["scan"]["judged_by"] == "held-back rows"
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"lr_finder.json", "lr_finder.svg"}


def test_text_ends_with_the_lines_for_the_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lr-find", str(config), "--steps", "16", "--lowest", "1e-4"]) == 0
    printed = capsys.readouterr().out
    assert "range test" in printed and "lr_finder.svg" in printed and "█" in printed
    assert printed.splitlines()[-2] == "training:" and "learning_rate: " in printed.splitlines()[-1]


def test_where_nothing_is_learned_the_error_says_so(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["lr-find", str(config), "--steps", "12", "--lowest", "1e-14", "--highest", "1e-13"]
    assert main(asked) == 2
    assert "PH705" in capsys.readouterr().err
