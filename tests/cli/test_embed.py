"""``pronghorn embed``: from files to an adapter, from an adapter to vectors, and what is refused before that."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pronghorn.cli.main import main
from tests.embedding.models import save_embedder
from tests.embedding.test_trainer import PAIRS


def write_rows(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    return path


def test_train_and_encode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = save_embedder(tmp_path / "base", "qwen3"), write_rows(tmp_path / "rows.jsonl")
    out = tmp_path / "out"
    train = [
        "embed",
        "train",
        "--model",
        str(model),
        "--data",
        str(rows),
        "--out",
        str(out),
        "--held-back",
        "3",
    ]
    train += [
        "--steps",
        "2",
        "--batch",
        "4",
        "--texts-at-a-time",
        "3",
        "--dims",
        "64,32",
        "--merged",
        "--learning-rate",
        "0.05",
        "--json",
    ]
    assert main(train) == 0
    said = capsys.readouterr().out
    assert "9 rows to train on, 3 held back; loss info_nce" in said
    assert "held-back rows\n  figure     before  after\n" in said
    last = json.loads(said.splitlines()[-1])
    assert last["steps"] == 2 and last["rows"] == 9 and set(last["before"]) == set(last["after"])
    assert set(last["after"]) == {"loss", "recall@1", "recall@10", "mrr@10", "ndcg@10"}
    texts = tmp_path / "texts.txt"
    texts.write_text("grass\nwhat is sage\n", encoding="utf-8")
    found = []
    for name, place in (("a.npy", last["adapter"]), ("b.safetensors", last["merged"])):
        file = tmp_path / "vectors" / name
        encode = ["embed", "encode", "--model", place, "--input", str(texts), "--output", str(file), "--json"]
        assert main(encode) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["shape"] == [2, 64]
        found.append(np.load(file) if file.suffix == ".npy" else load_file(file)["vectors"])
    assert found[0].dtype == np.float32 and np.allclose(np.linalg.norm(found[0], axis=1), 1, atol=1e-5)
    assert (found[0] * found[1]).sum(1).min() > 0.999  # the merged weights are rounded once more
    short = tmp_path / "c.npy"
    rows_in = ["--input", str(rows), "--field", "positive", "--prompt", "about: ", "--dim", "8"]
    assert main(["embed", "encode", "--model", last["merged"], *rows_in, "--output", str(short)]) == 0
    assert np.load(short).shape == (12, 8)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "--data", "nowhere.jsonl"], "there is no file 'nowhere.jsonl'"),
        (["train", "--data", "rows.jsonl", "--dims", "8;4"], "--dims 8;4 are no numbers"),
        (["train", "--data", "rows.jsonl", "--loss", "cosin"], "did you mean 'cosine'"),
        (["train", "--data", "rows.jsonl", "--held-back", "12"], "none of 12 is left"),
        (["encode", "--input", "rows.jsonl", "--output", "v.txt"], "use one of .npy, .safetensors"),
        (["encode", "--input", "rows.jsonl", "--output", "v.npy"], "name its column with --field"),
        (
            ["encode", "--input", "r", "--output", "v.npy", "--prompt", "a", "--prompt-name", "b"],
            "exclude each other",
        ),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    assert main(["embed", *arguments, "--model", "nowhere"]) == 2
    assert says in capsys.readouterr().err
