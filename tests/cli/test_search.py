"""``pronghorn search`` on a tiny model: a table, JSON, a file that ``train`` takes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pronghorn.cli.main import main
from pronghorn.config import load_config
from tests.cli.test_train import CONFIG, refused
from tests.tiny import save_tiny

VARIED = ["--vary", "learning_rate=1e-3,1e38", "--vary", "per_device_train_batch_size=2"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    save_tiny(folder / "model", "llama")
    rows = [{"prompt": f"Which number is {n}?", "completion": f"It is {n % 5}."} for n in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(model=folder / "model", rows=folder / "rows.jsonl", out=folder / "out"))
    return path


def test_search_then_train(config, capsys):
    search = ["search", str(config), *VARIED, "--steps", "1"]
    assert main(search) == 0
    out = capsys.readouterr().out
    assert "2 trials; held-out loss before training" in out and "failed: " in out
    lines = [line.split() for line in out.splitlines() if line.startswith("  ")]
    assert ["trial", "rate", "batch", "score", "loss", "time", "memory", "tokens/s"] in lines
    (best,) = [line for line in lines if line[-1] == "best"]
    assert best[:3] == ["0", "0.001", "2"] and best[-2] == "Pareto"
    folder = config.parent / "out" / "search"
    before, found = load_config(config), load_config(folder / "best.yaml")
    # 4 steps of 4 rows are 8 of 2.
    assert (found.training.learning_rate, found.training.per_device_train_batch_size) == (1e-3, 2)
    assert found.training.max_steps == 8
    assert found.adapter == before.adapter and found.model == before.model and found.data == before.data
    assert main([*search, "--json"]) == 0, "nothing is left to try"
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert said["best"] == 0 and said["config"] == str(folder / "best.yaml")
    assert Path(said["adapter"], "adapter_model.safetensors").is_file()
    assert [(trial["status"], trial["pareto"]) for trial in said["trials"]] == [
        ("done", True),
        ("failed", False),
    ]
    less = [
        f"--set={change}"
        for change in ("training.max_steps=1", "training.report=false", "output.save_merged=null")
    ]
    assert main(["train", str(folder / "best.yaml"), *less]) == 0
    capsys.readouterr()
    assert "of another space" in refused(capsys, "search", config, "--vary", "r=2")


def test_a_metric_of_one_s_own(config, capsys, tmp_path, monkeypatch):
    (tmp_path / "my_metric.py").write_text(
        "def length(model, tokenizer, rows):\n    return sum(len(row['completion']) for row in rows)\n"
    )
    monkeypatch.chdir(tmp_path)
    out = ["--set", f"output.folder={tmp_path}", "--steps", "1", "--vary", "r=2"]
    assert main(["search", str(config), *out, "--metric", "my_metric:length", "--json"]) == 0
    (trial,) = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["trials"]
    assert trial["score"] == 4 * len("It is 3.") != trial["loss"]
    assert "no function 'width'" in refused(capsys, "search", config, *out, "--metric", "my_metric:width")
    assert "cannot be imported" in refused(capsys, "search", config, *out, "--metric", "no_module:width")
    (tmp_path / "broken_metric.py").write_text("x = (\n")
    assert "SyntaxError" in refused(capsys, "search", config, *out, "--metric", "broken_metric:length")
    assert "names no function" in refused(capsys, "search", config, *out, "--metric", "my_metric")


def test_nothing_that_finishes_is_an_error(config, capsys, tmp_path):
    told = refused(
        capsys, "search", config, "--vary", "learning_rate=1e38", "--set", f"output.folder={tmp_path}"
    )
    assert "[PH708] none of 1 trials finished: " in told


@pytest.mark.parametrize(
    "given,told",
    [
        (["--vary", "rank=8"], "'rank' is no setting that a search varies"),
        (["--vary", "r=0"], "'r' cannot be 0"),
        (["--vary", "r=2", "--sampler", "griid"], "did you mean 'grid'"),
        (["--vary", "per_device_train_batch_size=13"], "13 rows is more than the 12 there are"),
        (["--vary", "r=2", "--set", "data.held_back=0"], "without them there is no score"),
        (["--vary", "r=2", "--maximize"], "give a metric to maximize"),
        (["--vary", "learning_rate=1e-5..1e-3"], "a grid needs values"),
        ([], "nothing varies"),
    ],
)
def test_what_is_refused(config, capsys, tmp_path, given, told):
    assert told in refused(capsys, "search", config, "--set", f"output.folder={tmp_path}", *given)


def test_all_weights_are_not_searched(config, capsys, tmp_path):
    path = tmp_path / "full.yaml"
    path.write_text(config.read_text().replace("adapter:\n  r: 4\n  lora_alpha: 8\n", ""))
    said = refused(
        capsys, "search", path, "--vary", "learning_rate=1e-3", "--set", "model.full_finetuning=true"
    )
    assert "puts one adapter after the other" in said
