"""``pronghorn plan`` from a folder that holds a config and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pronghorn.cli.main import main
from pronghorn.hardware import GpuMemory
from tests.tiny import save_tiny, tiny_config

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
    asked = ["--budget", "17.5GiB", "--batch", "4", "--gpu", "H200", "--load-in-16bit", "--compare"]
    assert main(["plan", folder, *asked]) == 0
    printed = capsys.readouterr().out
    assert "8.03 billion weights" in printed and "offload-attention" in printed
    assert "too much" in printed, "levels that do not fit are named beside the plan"
    for cause in ("weights", "adapters", "optimizer", "activations", "logits", "CUDA context"):
        assert f"\n  {cause} " in printed
    assert "Transformers + PEFT, 4-bit" in printed and "Transformers + PEFT, 16-bit" not in printed


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What ``pronghorn plan … --json`` prints."""
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_of(capsys, "--model", folder, "--budget", "20GiB", "--load-in-4bit", "--gpu", "RTX 4090")
    assert len(found["levels"]) == 32 and found["storage"] == "nf4 double" and found["gpu"] == "4090"
    assert found["estimate"]["reserved"] <= found["budget_bytes"] == 20 * 2**30
    assert sum(found["parts"].values()) == found["peak_bytes"] > found["estimate"]["reserved"]
    assert found["micro_batch"] * found["accumulation"] == found["global_batch"] == 16


def test_int8(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = (folder, "--gpu", "H200", "--batch", "4", "--load-in-int8")
    roomy = plan_of(capsys, *common, "--budget", "60GiB")
    tight = plan_of(capsys, *common, "--budget", "13GiB")
    assert (roomy["storage"], tight["storage"]) == ("int8 two", "int8"), "the second copy where there is room"
    more = roomy["estimate"]["weights"] - tight["estimate"]["weights"]
    assert 6.9e9 < more < 7.1e9, "a byte a weight of the decoder layers, and scales"


def test_without_offload_nothing_waits_on_the_host(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_of(capsys, folder, "--budget", "22GiB", "--no-offload", "--batch", "2", "--load-in-16bit")
    assert found["estimate"]["host"] == 0 and found["estimate"]["reserved"] <= 22 * 2**30


def test_the_precision_is_the_exact_one_that_fits(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_of(capsys, folder, "--gpu", "A100-40", "--batch", "1")["precision"] == "16-bit"
    assert plan_of(capsys, folder, "--gpu", "T4", "--batch", "1")["precision"] == "4-bit"
    assert plan_of(capsys, folder, "--gpu", "H100", "--batch", "1")["precision"] == "int8", (
        "measured, and faster"
    )


def test_rows_and_a_price_make_totals_and_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny(tmp_path / "model", "llama")
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "why? " * 5, "completion": "because. " * 9}
    rows.write_text("".join(json.dumps(row) + "\n" for _ in range(100)))
    asked = ["--gpu", "RTX 4090", "--data", str(rows), "--price-per-hour", "0.5"]
    found = plan_of(capsys, str(model), *asked)
    assert found["steps"] == 75, "100 rows, 3 passes, batches of 4"
    assert found["total_seconds"] == pytest.approx(75 * found["step_seconds"])
    assert found["cost"] == pytest.approx(0.5 * found["total_seconds"] / 3600)
    advice = {one["name"]: one for one in found["advice"]}
    assert advice["r"]["value"] == found["rank"] == 16
    assert all(one["rule"] and one["source"] for one in advice.values())
    assert main(["plan", str(model), *asked]) == 0
    printed = capsys.readouterr().out
    assert "learning_rate" in printed and "0.00 at 0.5 an hour" in printed


def test_a_table_over_gpus(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", folder, "--gpu", "T4", "--gpu", "B200", "--load-in-16bit", "--batch", "1"]
    assert main([*asked, "--price-per-hour", "B200=4"]) == 0
    printed = capsys.readouterr().out
    assert (
        "does not fit" in printed
        and "8,192 tokens" not in printed
        and "NVIDIA HGX B200 data sheet" in printed
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "12GiB", "--load-in-16bit"], "int8 weights, which take"),
        (["--budget", "7GiB", "--load-in-4bit", "--max-seq-length", "16384"], "rows of at most"),
        (["--budget", "2GiB", "--load-in-4bit"], "a budget of 6."),
        (["--budget", "12GiB", "--rank", "0"], "adapters of rank 16 instead of all weights"),
        (["--budget", "24GiB", "--load-in-int8", "--rank", "0"], "cannot be trained"),
        (["--gpu", "H200", "--load-in-4bit", "--rank", "0"], "cannot be trained"),
        (["--gpu", "V100-16", "--load-in-int8"], "no units for int8"),
        (["--budget", "lots"], "'lots' is no memory size"),
        (["--budget", "24GiB", "--gpu", "abacus"], "no rates are known"),
        (["--gpu", "T4", "--price-per-hour", "V100=1"], "does not say of which GPU"),
        (["--gpu", "T4", "--price-per-hour", "cheap"], "'cheap' is no price"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    folder: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", folder, *arguments]) == 2
    printed = capsys.readouterr().err
    assert said in printed and "Fix: " in printed and len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "gpu"), [("NVIDIA A100-SXM4-80GB", "A100-80"), ("NVIDIA Unknown", "NVIDIA Unknown")]
)
def test_the_gpu_of_this_machine(
    folder: str, name: str, gpu: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    monkeypatch.setattr("pronghorn.cli.plan.gpu_memory", lambda: GpuMemory(79 * 2**30, 40 * 2**30, 0))
    found = plan_of(capsys, folder, "--batch", "1", "--load-in-4bit")
    assert found["gpu"] == gpu and 36 * 2**30 < found["budget_bytes"] < 40 * 2**30, (
        "what is free, less a headroom"
    )


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path / "nothing"), "--budget", "24GiB"]) == 2
    assert "PH101" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["hidden_size", "num_key_value_heads", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 10**12])
def test_a_config_of_impossible_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str, value: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, size: value}))
    assert main(["plan", str(tmp_path), "--gpu", "H100"]) == 2
    said = capsys.readouterr().err
    # Transformers refuses a width that the heads do not divide by itself.
    assert "PH102" in said if size == "hidden_size" and "PH103" not in said else size in said


def test_a_step_is_whole_micro_batches(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = (folder, "--gpu", "H200", "--load-in-16bit", "--max-seq-length", "64", "--batch", "3")
    found = plan_of(capsys, *common)
    assert found["micro_batch"] * found["accumulation"] == found["global_batch"] == 18
    for asked in ("8", "2"):
        assert main(["plan", *common, "--global-batch", asked]) == 2
        assert "no whole number of micro-batches of 3" in capsys.readouterr().err


def test_every_family_of_the_fast_path_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for family in (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "phi3",
        "granite",
        "smollm3",
    ):
        tiny_config(family).save_pretrained(tmp_path / family)
        assert main(["plan", str(tmp_path / family), "--budget", "1GiB", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["levels"] == ["all", "all"]
