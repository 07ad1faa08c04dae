"""``pronghorn stress`` on a tiny model: a table, JSON, and what it refuses."""

from __future__ import annotations

import json

import pytest

from pronghorn.cli.main import main
from tests.cli.test_train import CONFIG
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stress")
    save_tiny(folder / "model", "llama")
    rows = [{"prompt": f"Which number is {n}?", "completion": f"It is {n % 5}."} for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(model=folder / "model", rows=folder / "rows.jsonl", out=folder / "out"))
    return path


def test_table(config, capsys):
    assert main(["stress", str(config), "--shares", "25", "--seeds", "2", "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "4 runs of 2 steps on 20 rows, scored on 4" in out
    lines = [line.split() for line in out.splitlines() if line.startswith("  ")]
    assert [line[0] for line in lines if line[0].endswith("%")][-2:] == ["0%", "25%"]
    assert "25% wrong answers" in out.splitlines()[-1]
    assert not (config.parent / "out" / "run.json").exists()


def test_json(config, capsys):
    assert main(["stress", str(config), "--shares", "50", "--seeds", "1", "--steps", "1", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert [(run["share"], run["wrong"]) for run in said["runs"]] == [(0.0, 0), (0.5, 10)]
    assert said["steps"] == 1 and said["sentences"][0].startswith("One seed does not tell")


def test_what_is_refused(config, capsys):
    assert main(["stress", str(config), "--set", "data.held_back=0"]) == 2
    assert "without them there is no score" in capsys.readouterr().err
    for shares in ("ten", "-5", "120", ""):
        with pytest.raises(SystemExit):
            main(["stress", str(config), "--shares", shares])
        assert "must be percents from 0 to 100" in capsys.readouterr().err
