"""``pronghorn plan`` from a folder that holds a config and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pronghorn.cli.main import main
from tests.tiny import tiny_config

LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(tmp_path)


def test_table(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", folder, "--budget", "17.5GiB", "--batch", "4", "--gpu", "H200"]) == 0
    printed = capsys.readouterr().out
    assert "8.03 billion weights" in printed and "offload-attention" in printed
    assert "too much" in printed, "levels that do not fit are named beside the plan"


def test_json(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", folder, "--budget", "24GiB", "--load-in-4bit", "--gpu", "RTX 4090", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["levels"]) == 32 and found["storage"] == "nf4 double" and found["gpu"] == "4090"
    assert found["estimate"]["reserved"] <= found["budget_bytes"] == 24 * 2**30


def test_int8(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = [
        "plan",
        folder,
        "--budget",
        "26GiB",
        "--gpu",
        "H200",
        "--batch",
        "4",
        "--json",
        "--load-in-int8",
    ]
    found = []
    for copies in ("1", "2"):
        assert main([*common, "--int8-copies", copies]) == 0
        found.append(json.loads(capsys.readouterr().out))
    one, two = found
    assert (one["storage"], two["storage"]) == ("int8", "int8 two")
    more = two["estimate"]["weights"] - one["estimate"]["weights"]
    assert 6.9e9 < more < 7.1e9, "a byte a weight of the decoder layers, and scales"


def test_without_offload_nothing_waits_on_the_host(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", folder, "--budget", "24GiB", "--no-offload", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["estimate"]["host"] == 0 and found["estimate"]["reserved"] <= 24 * 2**30


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "12GiB"], "load in 4 bits, which takes"),
        (["--budget", "7GiB", "--load-in-4bit", "--max-seq-length", "65536"], "at most"),
        (["--budget", "2GiB", "--load-in-4bit"], "the model alone takes 6."),
        (["--budget", "24GiB", "--load-in-int8", "--rank", "0"], "cannot be trained"),
        (["--budget", "lots"], "'lots' is no memory size"),
        (["--budget", "24GiB", "--gpu", "abacus"], "no rates are known"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    folder: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", folder, *arguments]) == 2
    printed = capsys.readouterr().err
    assert said in printed and "Fix: " in printed and len(printed.splitlines()) == 1


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "nothing"), "--budget", "24GiB"]) == 2
    assert "PH101" in capsys.readouterr().err


def test_every_family_of_the_fast_path_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        tiny_config(family).save_pretrained(tmp_path / family)
        assert main(["plan", str(tmp_path / family), "--budget", "1GiB", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["levels"] == ["all", "all"]
