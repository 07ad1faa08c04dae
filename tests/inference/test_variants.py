"""A base and its adapters under names of their own."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
from transformers import AutoModelForCausalLM

from pronghorn.errors import AdapterProblem, CheckpointCorrupt, CommandMisused
from pronghorn.inference.variants import load_variants, short_name
from tests.inference.adapters import save_base_and_adapters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_base_and_adapters(tmp_path_factory.mktemp("variants"))


def names(variants):
    return [variant.name for variant in variants]


def test_an_adapter_stands_for_itself_and_its_base(folder):
    adapters = {"other": str(folder / "casual.v2")}
    _, variants = load_variants(str(folder / "formal"), adapters, load_in_4bit=False)
    assert names(variants) == ["formal", "base", "other"]
    assert variants[0].adapter is not None and variants[1].adapter is None
    assert variants[0].tokenizer is variants[1].tokenizer  # it has none of its own
    assert variants[2].tokenizer.chat_template != variants[0].tokenizer.chat_template


def test_names_that_are_taken_and_folders_that_are_no_adapters(folder):
    with pytest.raises(CommandMisused, match="same name"):
        load_variants(str(folder / "base"), {"base": str(folder / "formal")})
    with pytest.raises(CommandMisused, match="same name"):
        load_variants(str(folder / "formal"), {"formal": str(folder / "casual.v2")})
    with pytest.raises(AdapterProblem, match="'x' is no adapter"):
        load_variants(str(folder / "base"), {"x": str(folder / "base")})


def test_an_adapter_of_another_model(folder, tmp_path):
    """The second one, which PEFT puts beside the first, is looked at as closely as the first."""
    shutil.copytree(folder / "casual.v2", tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign" / "adapter_config.json").read_text())
    (tmp_path / "foreign" / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    adapters = {"a": str(folder / "formal"), "b": str(tmp_path / "foreign")}
    with pytest.raises(CheckpointCorrupt):
        load_variants(str(folder / "base"), adapters, load_in_4bit=False)


def test_an_adapter_with_modules_of_its_own_is_alone(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    whole = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft.get_peft_model(model, whole).save_pretrained(tmp_path / "whole")
    _, variants = load_variants(str(folder / "base"), {"w": str(tmp_path / "whole")}, load_in_4bit=False)
    assert names(variants) == ["w"]
    adapters = {"w": str(tmp_path / "whole"), "a": str(folder / "formal")}
    with pytest.raises(AdapterProblem, match="modules of its own"):
        load_variants(str(folder / "base"), adapters, load_in_4bit=False)


def test_what_models_are_called(folder, tmp_path):
    (tmp_path / "small.Q8_0.gguf").write_bytes(b"")
    assert short_name(str(folder / "base") + "/") == "base"
    assert short_name(str(tmp_path / "small.Q8_0.gguf")) == "small.Q8_0"
    assert short_name("Qwen/Qwen2.5-1.5B") == "Qwen/Qwen2.5-1.5B"
