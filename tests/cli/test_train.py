"""`pronghorn train` from a YAML file to an adapter, a merged model and back; and what it refuses."""

import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from pronghorn.cli import train
from pronghorn.cli.main import main
from pronghorn.config import AdapterSection, ModelSection
from tests.tiny import save_tiny

CONFIG = """\
model:
  name: {model}
  max_seq_length: 64
  dtype: float32
  load_in_4bit: false
adapter:
  r: 4
  lora_alpha: 8
data:
  dataset: {rows}
  held_back: 4
training:
  max_steps: 4
  per_device_train_batch_size: 4
  learning_rate: 1e-2
  lr_scheduler_type: linear
  logging_steps: 1
  save_steps: 2
output:
  folder: {out}
  save_merged: merged_16bit
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    turns = [("user", "What does {} eat?"), ("assistant", "Grass and sagebrush, number {}.")]
    with path.open("w") as file:
        for number in range(24):
            messages = [{"role": role, "content": text.format(number)} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture
def config(tmp_path, model, rows):
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(model=model, rows=rows, out=tmp_path / "out"))
    return path


def summary_of(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def refused(capsys, *arguments) -> str:
    assert main(list(map(str, arguments))) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("pronghorn: [PH")]
    assert len(lines) == 1, error
    return lines[0]


def test_train_saves_an_adapter_and_a_merged_model_that_stock_libraries_load(config, model, tmp_path, capsys):
    assert main(["train", str(config), "--json"]) == 0
    summary = summary_of(capsys)
    assert summary["steps"] == 4
    assert (summary["train_rows"], summary["eval_rows"]) == (20, 4)
    assert 0 < summary["eval_loss"] < 10
    assert summary["adapter"] == str(tmp_path / "out" / "adapter")

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(5, 25)[None]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, summary["adapter"]).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(summary["merged"], dtype=torch.float32)(ids).logits
    change = (adapted - before).abs().max()
    assert change > 0.01
    # The merged weights are rounded to 16 bits (8 of precision in bf16), the logits are of the size of one.
    assert (merged - adapted).abs().max() < 0.05 * before.abs().max()


def test_an_export_that_differs_is_told_after_the_summary(config, tmp_path, capsys, monkeypatch):
    lost = (0, ["an adapter is not in it"])
    monkeypatch.setattr("pronghorn.export.checkpoint_gate.look_for_changes", lambda changed: lost)
    assert main(["train", str(config), "--json", "--set", "training.max_steps=1"]) == 2
    told = capsys.readouterr()
    summary = json.loads(told.out.strip().splitlines()[-1])
    assert "an adapter is not in it" in told.err and "Traceback" not in told.err
    merged = Path(summary["merged"])
    assert (merged / "export.failed.txt").is_file() and (merged / "config.json").is_file()


def test_resume_reaches_the_same_loss_as_an_uninterrupted_run(config, tmp_path, capsys):
    assert main(["train", str(config), "--json"]) == 0
    whole = summary_of(capsys)
    again = ["train", str(config), "--json", "--set", f"output.folder={tmp_path / 'second'}"]
    # Stopped after 2 of 4 steps as a kill would: the schedule still aims at 4.
    assert main([*again, "--set", "output.save_merged=null"]) == 0
    import shutil

    shutil.rmtree(tmp_path / "second" / "checkpoint-4")
    capsys.readouterr()
    assert main([*again, "--resume"]) == 0
    output = capsys.readouterr().out
    resumed = json.loads(output.splitlines()[-1])
    assert "(since checkpoint-2)" in output
    assert resumed["resumed_from"] == str(tmp_path / "second" / "checkpoint-2")
    assert resumed["steps"] == 4
    assert resumed["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-6)
    capsys.readouterr()
    assert main([*again, "--resume"]) == 0
    output = capsys.readouterr().out
    assert json.loads(output.splitlines()[-1])["train_loss"] is None and "the last step" in output


def test_no_steps_train_nothing_and_say_so(config, capsys):
    assert main(["train", str(config), "--json", "--set", "training.max_steps=0"]) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out.splitlines()[-1])
    assert summary["steps"] == 0 and summary["train_loss"] is None
    assert "nothing was to be trained (training.max_steps)" in said.out


def test_full_finetuning_saves_a_model(config, tmp_path, capsys):
    text = config.read_text().replace("adapter:\n  r: 4\n  lora_alpha: 8\n", "")
    config.write_text(text.replace("dtype: float32", "dtype: float32\n  full_finetuning: true"))
    assert main(["train", str(config), "--json", "--set", "training.max_steps=1"]) == 0
    summary = summary_of(capsys)
    assert summary["adapter"] is None
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(summary["model"])


def test_other_fields_of_sftconfig_reach_the_trainer(config, capsys):
    from pronghorn.cli.train import training_settings
    from pronghorn.config import load_config

    settings = training_settings(load_config(config, ["training.adam_beta1=0.8", "training.packing=true"]))
    assert (settings.adam_beta1, settings.packing, settings.max_length) == (0.8, True, "auto")


def test_the_save_level_of_either_section_counts(config):
    from pronghorn import binding_of
    from pronghorn.cli.train import load_model
    from pronghorn.config import load_config

    for section in ("model", "adapter"):
        override = f"{section}.use_gradient_checkpointing=attention"
        model, _ = load_model(load_config(config, [override]))
        assert binding_of(model).save_levels == ("attention", "attention")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.lerning_rate=1", "did you mean 'learning_rate'?"),
        ("training.adam_beta1=fast", "a number"),
        ("training.lr_scheduler_type=linaer", "did you mean 'linear'?"),
        ("training.optim=adamw_tosch", "did you mean 'adamw_torch'?"),
        ("model.dtype=bf17", "one of"),
        ("data.dataset=/absent/rows.jsonl", "there is no file"),
        ("data.held_back=1000", "only 24"),
        ("model.name=/absent/model", "[PH101]"),
        ("adapter.target_modules=[q_porj]", "[PH201]"),
        ("training.eval_strategy=epoch", None),
    ],
)
def test_mistakes_are_one_line(config, capsys, override, expected):
    if expected is None:
        assert "held" in refused(capsys, "train", config, "--set", "data.held_back=0", "--set", override)
    else:
        assert expected in refused(capsys, "train", config, "--set", override)


def test_unknown_key_names_its_line(config, capsys):
    config.write_text(config.read_text().replace("max_steps: 4", "max_stepz: 4"))
    line = refused(capsys, "train", config)
    assert f"{config}, line 13" in line
    assert "did you mean 'max_steps'?" in line


def test_a_line_that_is_no_json_is_the_only_line(config, tmp_path):
    """Also of what the libraries underneath log, which only a process of its own shows."""
    (tmp_path / "bad.jsonl").write_text("not json\n")
    command = [sys.executable, "-m", "pronghorn.cli", "train", str(config)]
    result = subprocess.run(
        [*command, "--set", f"data.dataset={tmp_path / 'bad.jsonl'}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")},
        timeout=120,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "bad.jsonl, line 1" in result.stderr


def test_nothing_to_resume(config, capsys):
    assert "[PH603]" in refused(capsys, "train", config, "--resume")


def test_a_broken_row_is_named(config, rows, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    lines = rows.read_text().splitlines()
    broken.write_text("\n".join([*lines[:2], '{"messages": [', *lines[2:]]))
    assert f"{broken}, line 3" in refused(capsys, "train", config, "--set", f"data.dataset={broken}")


def test_output_folder_is_checked_before_anything_is_loaded(config, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "[PH402]" in refused(capsys, "train", config, "--set", f"output.folder={folder}")


def test_out_of_memory_says_what_helps(config, monkeypatch, capsys):
    def exhausted(self, **arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("pronghorn.SFTTrainer.train", exhausted)
    line = refused(capsys, "train", config)
    assert "[PH501]" in line
    assert "offload" in line


def test_a_model_file_cut_short(config, model, tmp_path, capsys):
    import shutil

    cut = shutil.copytree(model, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "[PH102]" in refused(capsys, "train", config, "--set", f"model.name={cut}")


@pytest.mark.parametrize(
    ("function", "section", "elsewhere"),
    [
        # A token does not belong into a file: the hub's own settings (HF_TOKEN) hold it. Files hold rows of text.
        ("from_pretrained", ModelSection, {"kwargs", "token", "images"}),
        # loftq_config is a field of LoraConfig; the other two have one allowed value here, or belong to `model`.
        (
            "get_peft_model",
            AdapterSection,
            {"model", "kwargs", "loftq_config", "qat_scheme", "max_seq_length"},
        ),
    ],
)
def test_every_argument_of_the_python_interface_is_a_key(function, section, elsewhere):
    from pronghorn import FastLanguageModel

    keys = {item.metadata.get("argument", item.name) for item in dataclasses.fields(section)}
    arguments = set(inspect.signature(getattr(FastLanguageModel, function)).parameters)
    assert arguments - elsewhere == keys - {"other"}


class CtrlC(TrainerCallback):
    """Interrupts this process in the middle of step 2, `times` times."""

    def __init__(self, times):
        self.times = times

    def on_step_begin(self, args, state, control, **kwargs):
        for _ in range(self.times if state.global_step == 1 else 0):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_finishes_and_saves_the_step(config, tmp_path, capsys, monkeypatch):
    make = train.make_trainer

    def interrupted(*arguments):
        trainer, rows = make(*arguments)
        trainer.add_callback(CtrlC(times))
        return trainer, rows

    monkeypatch.setattr(train, "make_trainer", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    more = ["--set", "training.save_steps=100", "--set", "training.max_steps=9"]
    times = 2  # the second one does not wait
    assert main(["train", str(config), *more]) == 130
    assert not list((tmp_path / "out").glob("checkpoint-*")) and "--resume" not in capsys.readouterr().err
    times = 1
    assert main(["train", str(config), *more]) == 130
    assert "stopped after step 2 of 9, which is saved in" in capsys.readouterr().err
    assert (tmp_path / "out" / "checkpoint-2").is_dir() and signal.getsignal(signal.SIGINT) is handler
    times = 0
    assert main(["train", str(config), *more, "--resume", "--json"]) == 0
    assert summary_of(capsys)["resumed_from"].endswith("checkpoint-2")


def test_what_is_no_configuration(tmp_path, capsys):
    (tmp_path / "list.yaml").write_text("[]")
    assert "this is a folder, and a .yaml file is wanted" in refused(capsys, "train", tmp_path)
    assert "has sections with keys, and this is a list" in refused(capsys, "train", tmp_path / "list.yaml")
    assert "pronghorn train run.yaml" in refused(capsys, "run", "run.yaml")
    said = refused(capsys, "chat", tmp_path / "list.yaml", "--prompt", "hello")
    assert "give an existing folder" in said
