"""Configurations are read strictly: what is wrong, where, and what was probably meant."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pronghorn.config import AdapterSection, arguments, load_config, parse_config, section_arguments
from pronghorn.errors import ConfigInvalid

MINIMAL = "model:\n  name: some/model\ndata:\n  dataset: docstrings\n"


def refused(text: str, *overrides: str) -> ConfigInvalid:
    with pytest.raises(ConfigInvalid) as caught:
        parse_config(text, "run.yaml", overrides)
    return caught.value


def test_minimal_configuration_has_defaults():
    config = parse_config(MINIMAL)
    assert config.model.name == "some/model"
    assert config.model.max_seq_length is None
    assert config.training.seed == 3407
    assert config.adapter == AdapterSection()
    assert config.training.other == {}


def test_sections_are_frozen():
    config = parse_config(MINIMAL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.name = "another"


def test_unknown_key_names_file_line_and_nearest_key():
    error = refused(MINIMAL + "output:\n  folder: x\n  save_adaptre: true\n")
    assert "save_adaptre" in error.message
    assert error.where == "run.yaml, line 7"
    assert error.fix == "did you mean 'save_adapter'?"
    assert str(error).startswith("[PH401] ")


def test_unknown_section():
    error = refused(MINIMAL + "trainig:\n  max_steps: 3\n")
    assert error.where == "run.yaml, line 5"
    assert "'training'" in error.fix


@pytest.mark.parametrize(
    ("section", "line", "fix"),
    [
        ("model", "max_seq_length: long", "a whole number"),
        ("model", "max_seq_length: 0", "at least 1"),
        ("model", "max_seq_length: true", "a whole number"),
        ("model", "load_in_4bit: 1", "true or false"),
        ("model", "dtype: bfloat61", "did you mean 'bfloat16'?"),
        ("data", "held_back: -1", "at least 0"),
        ("data", "held_back: 1.5", "a whole number"),
        ("training", "learning_rate: .nan", "give a number"),
        ("training", "seed: -1", "at least 0"),
        ("training", "seed: 4294967296", "less than 4294967296"),
        ("data", "text_field: [a]", "text"),
    ],
)
def test_wrong_values(section, line, fix):
    key = line.partition(":")[0]
    with_section = MINIMAL if f"{section}:\n" in MINIMAL else f"{MINIMAL}{section}:\n"
    error = refused(with_section.replace(f"{section}:\n", f"{section}:\n  {line}\n"))
    assert key in error.message
    assert fix in error.fix
    assert error.where == f"run.yaml, line { {'model': 2, 'data': 4, 'training': 6}[section] }"


@pytest.mark.parametrize("value", ["1.0", "-0.1", "'0.1'"])
def test_dropout_is_a_probability_below_one(value):
    assert "lora_dropout" in refused(MINIMAL + f"adapter: {{lora_dropout: {value}}}\n").message


def test_exponent_without_dot_is_a_number():
    config = parse_config(MINIMAL + "training:\n  learning_rate: 2e-4\n")
    assert config.training.learning_rate == 2e-4


def test_no_is_a_choice_and_not_false():
    """YAML 1.1 reads a bare no as false."""
    text = "model: {name: m}\ndata: {dataset: d}\ntraining: {eval_strategy: no, save_strategy: no}\n"
    config = parse_config(text)
    assert (config.training.eval_strategy, config.training.save_strategy) == ("no", "no")


def test_list_items_are_checked():
    error = refused(MINIMAL + "adapter:\n  target_modules: [q_proj, 3]\n")
    assert "target_modules" in error.message


def test_key_given_twice():
    error = refused("model:\n  name: a\n  name: b\n")
    assert error.where == "run.yaml, line 3"
    assert "first in line 2" in error.message


def test_missing_keys():
    assert "'model' is missing" in refused("data:\n  dataset: x\n").message
    assert "'data.dataset' is missing" in refused("model:\n  name: a\ndata:\n").message


def test_not_yaml_names_the_line():
    error = refused("model:\n  name: [a\ndata: x\n")
    assert "not YAML" in error.message
    assert "line 3" in error.where


@pytest.mark.parametrize("text", ["just text", "- a\n- b\n"])
def test_not_a_mapping(text):
    assert "sections" in refused(text).message


def test_section_that_is_no_section():
    assert refused(MINIMAL + "training: fast\n").where == "run.yaml, line 5"


def test_overrides_win_and_are_checked():
    config = parse_config(MINIMAL, overrides=["training.max_steps=10", "adapter.bias=all", "model.name=x"])
    assert (config.training.max_steps, config.adapter.bias, config.model.name) == (10, "all", "x")
    error = refused(MINIMAL, "data.splti=test")
    assert error.where == "--set data.splti"
    assert "'split'" in error.fix
    assert "section.key=value" in refused(MINIMAL, "max_steps=3").message


def test_exclusive_choices():
    quantised = MINIMAL.replace("data:", "  load_in_4bit: true\n  load_in_8bit: true\ndata:")
    assert "exclude" in refused(quantised).message
    full = MINIMAL.replace("data:", "  full_finetuning: true\ndata:")
    assert "no place" in refused(full + "adapter:\n  r: 8\n").message
    assert parse_config(full).model.full_finetuning


def test_training_accepts_fields_of_sftconfig_only():
    config = parse_config(MINIMAL + "training:\n  max_steps: 3\n  adam_beta1: 0.8\n", "run.yaml")
    assert section_arguments(config, "training", {"adam_beta1": float, "max_steps": int}) == {
        "max_steps": 3,
        "adam_beta1": 0.8,
        "seed": 3407,
    }
    config = parse_config(MINIMAL + "training:\n  lerning_rate: 0.1\n", "run.yaml")
    with pytest.raises(ConfigInvalid, match="lerning_rate") as caught:
        section_arguments(config, "training", {"adam_beta1": float})
    assert caught.value.where == "run.yaml, line 6"
    assert caught.value.fix == "did you mean 'learning_rate'?"


@pytest.mark.parametrize(
    ("line", "hint", "fix"),
    [("adam_beta1: fast", float, "a number"), ("bf16: 1", bool | None, "true or false")],
)
def test_other_fields_are_checked_by_their_types(line, hint, fix):
    config = parse_config(MINIMAL + f"training:\n  {line}\n", "run.yaml")
    with pytest.raises(ConfigInvalid) as caught:
        section_arguments(config, "training", {line.partition(":")[0]: hint})
    assert caught.value.where == "run.yaml, line 6"
    assert fix in caught.value.fix


def test_exponent_of_another_field_is_a_number():
    config = parse_config(MINIMAL + "training:\n  adam_epsilon: 1e-8\n", "run.yaml")
    assert section_arguments(config, "training", {"adam_epsilon": float})["adam_epsilon"] == 1e-8


def test_an_unknown_adapter_key_is_refused_when_the_run_starts():
    config = parse_config(MINIMAL + "adapter:\n  r: 8\n  lora_alhpa: 16\n", "run.yaml")
    with pytest.raises(ConfigInvalid, match="lora_alhpa") as caught:
        section_arguments(config, "adapter", {"loftq_config": dict})
    assert caught.value.where == "run.yaml, line 7"
    assert caught.value.fix == "did you mean 'lora_alpha'?"


def test_evaluation_needs_held_back_rows():
    assert "data.held_back" in refused(MINIMAL + "training:\n  eval_strategy: steps\n").fix


def test_arguments_leave_out_what_is_not_set():
    config = parse_config(MINIMAL + "adapter:\n  r: 4\n")
    assert arguments(config.adapter) == {"r": 4}
    assert arguments(config.model)["model_name"] == "some/model"


def test_missing_file(tmp_path):
    with pytest.raises(ConfigInvalid, match="no such file"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_rows_in_place_of_a_configuration(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1\xff")
    with pytest.raises(ConfigInvalid, match="a file of rows") as caught:
        load_config(tmp_path / name)
    assert f"dataset: {tmp_path / name}" in caught.value.fix


def test_reading_a_configuration_imports_no_torch():
    code = "import sys, pronghorn.config; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
