"""`pronghorn speech`: from a published folder to codes, and token rows for Orpheus."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pronghorn.cli.main import main
from tests.speech.test_orpheus import CODES as PLACE_CODES
from tests.speech.test_orpheus import frames, orpheus_tokenizer
from tests.speech.tiny import BOOKS, CODES, random_codes, save_speech_tiny, write_rows
from tests.tiny import save_tiny

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the command would take the GPU")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_speech_tiny(tmp_path_factory.mktemp("speech") / "model"))


@pytest.fixture(scope="module")
def orpheus(tmp_path_factory):
    tokenizer = orpheus_tokenizer()
    folder = save_tiny(tmp_path_factory.mktemp("orpheus"), "llama", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return str(folder)


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_train_generate_and_export(model, tmp_path, capsys):
    rows = str(write_rows(tmp_path / "rows.jsonl", 5))
    out = tmp_path / "out"
    command = ["speech", "train", model, rows, "--out", str(out), "--rank", "4", "--json"]
    assert main([*command, "--steps", "3", "--held-back", "1"]) == 0
    said = last_json(capsys)
    assert said["steps"] == 3 and said["train_rows"] == 4
    assert said["loss"] == pytest.approx(said["token_loss"] + said["code_loss"], rel=1e-4)
    assert said["eval_loss"] == pytest.approx(said["eval_token_loss"] + said["eval_code_loss"])
    assert (out / "adapter" / "adapter_model.safetensors").is_file()

    codes = tmp_path / "codes.npy"
    speak = [
        "speech",
        "generate",
        said["adapter"],
        "--text",
        "Say it.",
        "--out",
        str(codes),
        "--max-frames",
        "4",
    ]
    np.save(tmp_path / "voice.npy", random_codes(3))
    voice = ["--reference-text", "Me.", "--reference-codes", str(tmp_path / "voice.npy")]
    assert main([*speak, *voice, "--json"]) == 0
    found = np.load(codes)
    assert last_json(capsys)["frames"] == found.shape[1] <= 4
    assert found.shape[0] == BOOKS and (found < CODES).all()

    assert main(["speech", "export", said["adapter"], "--out", str(tmp_path / "merged")]) == 0
    merged, published = (load_file(f"{folder}/model.safetensors") for folder in (tmp_path / "merged", model))
    assert set(merged) == set(published) and torch.equal(merged["norm.weight"], published["norm.weight"])
    assert not torch.equal(
        merged["layers.0.attention.wqkv.weight"], published["layers.0.attention.wqkv.weight"]
    )


def test_going_on_with_a_run(model, tmp_path, capsys):
    rows = str(write_rows(tmp_path / "rows.jsonl", 2))
    command = ["speech", "train", model, rows, "--out", str(tmp_path / "out"), "--rank", "2", "--json"]
    assert main([*command, "--epochs", "1"]) == 0
    assert last_json(capsys)["steps"] == 1
    assert main([*command, "--epochs", "2", "--resume"]) == 0
    assert last_json(capsys)["steps"] == 2


def test_rows_of_fish_speech_are_checked(model, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", 3)
    assert main(["speech", "rows", model, str(rows), "--json"]) == 0
    assert last_json(capsys)["rows"] == 3
    with rows.open("a") as file:
        file.write(json.dumps({"text": "bad", "codes": [[CODES]] * BOOKS}) + "\n")
    assert main(["speech", "rows", model, str(rows)]) == 2
    assert "line 4" in capsys.readouterr().err
    assert main(["speech", "rows", model, str(rows), "--out", "x.jsonl"]) == 2


def test_rows_of_orpheus_train_with_the_ordinary_command(orpheus, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"{i}.", "codes": frames(2 + i).tolist()}) + "\n" for i in range(3))
    )
    tokens = tmp_path / "tokens.jsonl"
    assert main(["speech", "rows", orpheus, str(rows), "--out", str(tokens)]) == 0
    assert len(tokens.read_text().splitlines()) == 3
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model:\n  name: {orpheus}\n  load_in_4bit: false\ndata:\n  dataset: {tokens}\nadapter:\n  r: 4\n"
        f"training:\n  max_steps: 2\n  use_cpu: true\noutput:\n  folder: {tmp_path / 'out'}\n"
    )
    capsys.readouterr()
    assert main(["train", str(config), "--json"]) == 0
    adapter = last_json(capsys)["adapter"]
    codes = tmp_path / "codes"
    assert (
        main(["speech", "generate", adapter, "--text", "1.", "--out", str(codes), "--max-frames", "2"]) == 0
    )
    found = np.load(f"{codes}.npy")
    assert found.shape[0] == 7 and (found < PLACE_CODES).all()


def test_converting_a_pickle(tmp_path, capsys):
    folder = save_speech_tiny(tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "model.pth")
    (folder / "model.safetensors").unlink()
    assert main(["speech", "convert", str(folder)]) == 0
    assert "model.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["generate", "{model}", "--text", "a", "--out", "x", "--reference-text", "b"], "PH404|reference"),
        (["generate", "{model}", "--text", "a", "--out", "x", "--voice", "tara"], "--voice is for Orpheus"),
        (["generate", "{model}", "--text", "a", "--out", "x", "--top-p", "2"], "PH803"),
        (["train", "{orpheus}", "{rows}"], "pronghorn speech rows"),
        (["train", "{model}", "{rows}", "--held-back", "9"], "hold back fewer"),
        (["train", "{model}", "nowhere.jsonl"], "there is no file"),
        (["convert", "nowhere"], "PH101"),
    ],
)
def test_mistakes(arguments, words, model, orpheus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"{model}": model, "{orpheus}": orpheus, "{rows}": str(write_rows(tmp_path / "rows.jsonl"))}
    assert main(["speech", *(names.get(argument, argument) for argument in arguments)]) == 2
    import re

    assert re.search(words, capsys.readouterr().err)
