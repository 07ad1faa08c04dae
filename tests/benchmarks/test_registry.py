"""The registry, rows and checkpoints that every side shares."""

from __future__ import annotations

import json

import pytest

from benchmarks.libraries import MIXED_MEAN, rows_per_batch
from benchmarks.models import CONFIGS, FIRST_TOKEN, benchmark_tokenizer, model_config, write_checkpoint
from benchmarks.registry import BASELINE, DEFAULT_SIDES, SIDES, WORKLOADS, pick
from benchmarks.rows import token_rows


def test_names_are_keys_and_models_exist() -> None:
    assert all(name == item.name for known in (WORKLOADS, SIDES) for name, item in known.items())
    assert {workload.model for workload in WORKLOADS.values()} <= set(CONFIGS)
    assert BASELINE in SIDES
    assert set(DEFAULT_SIDES) <= set(SIDES)


def test_pronghorn_sides_name_real_save_levels() -> None:
    from pronghorn.blocks import LEVELS

    levels = {side.checkpointing for side in SIDES.values() if side.library == "pronghorn"}
    assert levels <= set(LEVELS)


def test_pick() -> None:
    assert pick(None, SIDES, ("hf",)) == ["hf"]
    assert pick(" unsloth, hf", SIDES, ()) == ["unsloth", "hf"]
    assert pick("all", WORKLOADS, ()) == list(WORKLOADS)
    with pytest.raises(SystemExit, match=r"nope.*known: hf"):
        pick("hf,nope", SIDES, ())


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


def test_mixed_rows_have_instruction_lengths() -> None:
    lengths = [len(row) for row in token_rows(3000, 1024, 512, mixed=True)]
    assert 16 <= min(lengths) < max(lengths) <= 1024
    # The standard error of the mean of 3000 log-normal lengths is about 2 tokens.
    assert abs(sum(lengths) / len(lengths) - MIXED_MEAN) < 8


def test_a_packing_side_gets_as_many_tokens_a_step() -> None:
    mixed = WORKLOADS["qwen1.5b-mixed"]
    assert rows_per_batch(mixed, SIDES["unsloth"]) == mixed.rows
    assert rows_per_batch(mixed, SIDES["unsloth-packing"]) == round(mixed.rows * MIXED_MEAN / mixed.length)
    assert rows_per_batch(WORKLOADS["tiny"], SIDES["unsloth-packing"]) == WORKLOADS["tiny"].rows


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
    before = (folder / "model-00001-of-00001.safetensors").stat().st_mtime_ns
    write_checkpoint("tiny", tmp_path, seed=5)
    assert (folder / "model-00001-of-00001.safetensors").stat().st_mtime_ns == before
