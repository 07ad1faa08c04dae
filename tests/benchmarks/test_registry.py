"""The registry, rows and checkpoints that every side shares."""

from __future__ import annotations

import json

import pytest

from benchmarks.libraries import _argument_names, _checked, batch_shape
from benchmarks.models import (
    CONFIGS,
    FIRST_TOKEN,
    benchmark_tokenizer,
    find_model,
    model_config,
    write_checkpoint,
)
from benchmarks.registry import (
    BASELINE,
    DEFAULT_SIDES,
    LEVELS,
    SIDES,
    WORKLOADS,
    Side,
    find_side,
    find_workload,
    parse_side,
    split,
)
from benchmarks.rows import DISTRIBUTIONS, UNSUPERVISED, columns, token_rows
from benchmarks.side import documents_needed


def test_names_are_keys_and_models_exist() -> None:
    assert all(name == item.name for known in (WORKLOADS, SIDES) for name, item in known.items())
    assert {workload.model for workload in WORKLOADS.values()} <= set(CONFIGS)
    assert BASELINE in SIDES
    assert set(DEFAULT_SIDES) <= set(SIDES)


def test_pronghorn_sides_name_real_save_levels() -> None:
    from pronghorn import blocks

    assert set(LEVELS) == set(blocks.LEVELS)


def test_a_name_is_a_side() -> None:
    side = parse_side("pronghorn-fp8-17.5GiB-eager-packing")
    assert side.load == {"load_in_fp8": True}
    assert side.train == {"memory_budget": "17.5GiB", "cuda_graphs": False}
    assert side.packing
    assert side.checkpointing is None, "the default is the library's to choose"
    assert parse_side("pronghorn-offload-attention-eager").checkpointing == "offload-attention"
    assert parse_side("pronghorn-offload-cudnn").checkpointing == "offload"
    assert parse_side("unsloth-tuned").checkpointing is False
    assert parse_side("unsloth-16x1").batch == (16, 1)
    assert parse_side("hf").checkpointing is True
    for wrong in ("hf-all", "pronghorn-fast", "axolotl", "unsloth-fp8"):
        with pytest.raises(ValueError, match=r"is no library|says nothing"):
            parse_side(wrong)


def test_fp8_sides() -> None:
    side = parse_side("pronghorn-fp8-mixed-skip0-copies2")
    assert side.load == {"load_in_fp8": "mixed", "fp8_skip_layers": 0, "fp8_copies": 2}
    assert side.gates(WORKLOADS["llama8b-lora"]) == "fp8-mixed fp8_skip_layers=0"
    assert SIDES["pronghorn-fp8"].gates(WORKLOADS["llama8b-qlora"]) == "nf4-fp8"
    with pytest.raises(ValueError, match="says nothing"):
        parse_side("pronghorn-mixed")


def test_int8_sides() -> None:
    side = parse_side("pronghorn-int8-copies1-17.5GiB")
    assert side.load == {"load_in_int8": True, "int8_copies": 1} and side.eight_bit == "int8"
    assert side.gates(WORKLOADS["llama8b-lora"]) == "int8 int8_copies=1"
    assert parse_side("pronghorn-int8-copies2").gates(WORKLOADS["llama8b-lora"]) == "int8"
    assert side.label(WORKLOADS["llama8b-lora"]) == "quantised (INT8)"
    side = SIDES["pronghorn-int8-all"]
    assert side.label(WORKLOADS["llama8b-qlora"]) == "quantised (NF4, INT8)"
    assert side.gates(WORKLOADS["llama8b-qlora"]) == "nf4-int8"


def test_find() -> None:
    assert find_side("unsloth") is SIDES["unsloth"]
    with pytest.raises(SystemExit, match=r"nope.*known: hf"):
        find_side("nope")
    assert find_workload("tiny") is WORKLOADS["tiny"]
    longer = find_workload("llama8b-qlora@1x16384@24")
    assert (longer.rows, longer.length, longer.cap_gib, longer.four_bit) == (1, 16384, 24.0, True)
    with pytest.raises(SystemExit, match=r"nope; known: llama8b-lora"):
        find_workload("nope")
    assert split(None, SIDES, ("hf",)) == ["hf"]
    assert split(" unsloth, hf", SIDES, ()) == ["unsloth", "hf"]
    assert split("all", WORKLOADS, ()) == list(WORKLOADS)


def test_arguments_that_do_not_exist_are_named() -> None:
    def load(name: str, load_in_4bit: bool = False, **kwargs: object) -> None: ...

    side = Side("pronghorn-fp8", "pronghorn", None, load={"load_in_fp8": True})
    with pytest.raises(
        TypeError, match=r"side pronghorn-fp8 needs .*load\(load_in_fp8=.*it has load_in_4bit"
    ):
        _checked(side, load, side.load)
    assert _checked(side, load, {"load_in_4bit": True}) == {"load_in_4bit": True}


def test_trainer_arguments_of_the_sides_exist() -> None:
    from pronghorn import FastLanguageModel, SFTConfig

    ours = [side for side in SIDES.values() if side.library == "pronghorn"]
    assert {name for side in ours for name in side.train} <= _argument_names(SFTConfig)
    for side in [*ours, parse_side("pronghorn-fp8-skip0-copies2")]:
        _checked(side, FastLanguageModel.from_pretrained, side.load)


def test_labels() -> None:
    lora, qlora = WORKLOADS["llama8b-lora"], WORKLOADS["llama8b-qlora"]
    assert SIDES["pronghorn-all"].label(lora) == "exact"
    assert SIDES["pronghorn-fp8"].label(lora) == "quantised (FP8)"
    assert SIDES["pronghorn-fp8"].label(qlora) == "quantised (NF4, FP8)"
    assert SIDES["unsloth"].label(qlora) == "quantised (NF4)"


def test_public_sizes_count_the_published_parameters() -> None:
    """The written-out configs are the public models': their parameter counts agree with the published ones."""
    import torch
    from transformers import AutoModelForCausalLM

    published = {
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.2-1b": 1_235_814_400,
        "qwen2.5-1.5b": 1_543_714_304,
        "smollm2-135m": 134_515_008,
    }
    for name, count in published.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config(name))
        assert sum(parameter.numel() for parameter in model.parameters()) == count, name


def test_rows_are_reproducible_and_of_the_asked_length() -> None:
    rows = token_rows(5, 32, 512)
    assert rows == token_rows(5, 32, 512)
    assert rows != token_rows(5, 32, 512, seed=1)
    assert {len(row) for row in rows} == {32}
    assert all(FIRST_TOKEN <= token < 512 for row in rows for token in row)


@pytest.mark.parametrize(
    ("name", "median", "mean", "p95"), [("mixed", 110, 146, 378), ("alpaca", 90, 130, 368)]
)
def test_lengths_of_instruction_data(name: str, median: int, mean: int, p95: int) -> None:
    lengths = sorted(len(row) for row in token_rows(3000, 2048, 512, lengths=name))
    assert lengths[0] >= DISTRIBUTIONS[name].shortest
    assert lengths[-1] <= 2048
    # The standard errors of 3000 log-normal lengths: 2 tokens for median and mean, 12 for the 95th percentile.
    assert abs(lengths[1500] - median) < 8
    assert abs(sum(lengths) / 3000 - mean) < 8
    assert abs(DISTRIBUTIONS[name].mean - mean) < 2
    assert abs(lengths[2850] - p95) < 45


def test_alpaca_prompts_are_not_supervised() -> None:
    table = columns(500, 2048, 512, lengths="alpaca")
    supervised = 0
    for ids, labels in zip(table["input_ids"], table["labels"], strict=True):
        prompt = labels.count(UNSUPERVISED)
        assert labels == [UNSUPERVISED] * prompt + ids[prompt:]
        assert prompt < len(ids)
        supervised += len(ids) - prompt
    assert 0.4 < supervised / sum(map(len, table["input_ids"])) < 0.8
    assert set(columns(2, 8, 512)) == {"input_ids"}


def test_batches_of_sides_that_pack() -> None:
    mixed = WORKLOADS["qwen1.5b-mixed"]
    assert batch_shape(mixed, SIDES["unsloth"]) == (mixed.rows, 1)
    assert batch_shape(mixed, SIDES["unsloth-packing"]) == (2, 1)
    assert batch_shape(WORKLOADS["tiny"], SIDES["unsloth-packing"]) == (2, 1)
    assert batch_shape(WORKLOADS["alpaca"], SIDES["unsloth"]) == (2, 4)
    assert batch_shape(WORKLOADS["alpaca"], parse_side("unsloth-8x1")) == (8, 1)
    assert documents_needed(WORKLOADS["alpaca"], SIDES["unsloth"], 10) == 80
    assert documents_needed(WORKLOADS["alpaca"], SIDES["unsloth-packing"], 10) > 10 * 2 * 2048 / 130


def test_the_tokenizer_has_its_special_tokens_below_the_rows_ids() -> None:
    tokenizer = benchmark_tokenizer()
    assert tokenizer.decode(tokenizer("pronghorn").input_ids) == "pronghorn"
    special = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id]
    assert len(set(special)) == 4
    assert max(special) < FIRST_TOKEN
    config = model_config("tiny")
    assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_checkpoint_loads_strictly_and_shards_agree(tmp_path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    whole = write_checkpoint("tiny", tmp_path / "whole")
    sharded = write_checkpoint("tiny", tmp_path / "sharded", shard_bytes=40_000)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    first, second = (
        AutoModelForCausalLM.from_pretrained(p, output_loading_info=True) for p in (whole, sharded)
    )
    assert not any(first[1][key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pairs = zip(first[0].parameters(), second[0].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    matrix = first[0].model.layers[0].mlp.up_proj.weight.float()
    assert 0.018 < matrix.std() < 0.022


def test_a_finished_checkpoint_is_left_alone(tmp_path) -> None:
    folder = write_checkpoint("tiny", tmp_path)
    before = (folder / "model-00001.safetensors").stat().st_mtime_ns
    write_checkpoint("tiny", tmp_path, seed=5)
    assert (folder / "model-00001.safetensors").stat().st_mtime_ns == before


def test_a_shallower_model_is_a_change_of_a_workload() -> None:
    workload = find_workload("tiny@1layers@1x64@8")
    assert (workload.model, workload.rows, workload.length) == ("tiny-1-layers", 1, 64)
    assert workload.cap_gib == 8.0 and workload.name == "tiny@1layers@1x64@8"
    assert model_config("tiny-1-layers").num_hidden_layers == 1
    assert find_model("qwen2.5-1.5b-3-layers") == "qwen2.5-1.5b-3-layers"
    assert model_config("qwen2.5-1.5b-3-layers").num_hidden_layers == 3 and find_model("tiny") == "tiny"
    with pytest.raises(SystemExit, match="unknown: tiny-layers"):
        find_model("tiny-layers")
