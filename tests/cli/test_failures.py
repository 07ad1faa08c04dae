"""What goes wrong in the middle of ``pronghorn train`` ends in one explained line, never in a traceback."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pronghorn.cli.main import main
from tests.tiny import save_tiny

CONFIG = """\
model: {{name: {model}, max_seq_length: 64, dtype: float32, load_in_4bit: false}}
adapter: {{r: 4, lora_alpha: 8}}
data: {{dataset: {rows}, held_back: 0}}
training: {{max_steps: 2, per_device_train_batch_size: 4, logging_steps: 1, save_steps: 1}}
output: {{folder: {out}}}
"""


@pytest.fixture
def config(tmp_path):
    rows = tmp_path / "rows.jsonl"
    texts = ["grass and sagebrush", "the fastest land animal", "what does it eat?", "North America"]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = save_tiny(tmp_path / "model", "llama")
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(model=model, rows=rows, out=tmp_path / "out"))
    return path


def refused(capsys, *arguments) -> str:
    assert main(["train", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("pronghorn: [PH")]
    assert len(lines) == 1 and "Traceback" not in said
    return lines[0]


def test_a_value_that_is_no_number_in_the_checkpoint(config, capsys):
    file = config.parent / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.down_proj.weight"][5, 7] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    said = refused(capsys, config)
    assert "[PH701] the loss is nan at step 1" in said
    assert "model.layers.1.mlp.down_proj.base_layer.weight has a value that is nan (first at [5, 7])" in said
    assert "load or download the checkpoint again" in said


def test_a_run_that_ends_without_numbers_saves_nothing_and_says_so(config, capsys, monkeypatch):
    from pronghorn.engine import StepOutput
    from pronghorn.training.steps import StaticSteps

    right, bad, step = StaticSteps.run, [2, 3, 4], [0]

    def breaks(self, inputs, normalizer):
        step[0] += 1
        output = right(self, inputs, normalizer)
        return output if step[0] not in bad else StepOutput(output.loss * float("nan"), output.num_correct)

    monkeypatch.setattr(StaticSteps, "run", breaks)
    several = ("--set", "training.max_steps=4")
    said = refused(capsys, config, *several)
    assert "[PH701] the loss is no number from step 2 to the end" in said and "lower learning_rate" in said
    assert not (config.parent / "out" / "adapter").exists()
    bad[:], step[:] = [4], [0]  # one row's doing
    assert main(["train", str(config), *several]) == 0
    assert (config.parent / "out" / "adapter").exists()


def test_the_best_weights_are_saved_of_a_run_that_ends_without_numbers(config, capsys, monkeypatch):
    """`stop_early` ends it, and loads them."""
    from pronghorn.engine import StepOutput
    from pronghorn.training import SFTTrainer
    from pronghorn.training.steps import StaticSteps

    right, evaluated, step = StaticSteps.run, SFTTrainer.evaluation_loop, [0]

    def breaks(self, inputs, normalizer):
        step[0] += 1
        output = right(self, inputs, normalizer)
        return output if step[0] < 3 else StepOutput(output.loss * float("nan"), output.num_correct)

    def worse(self, *args, **given):
        output = evaluated(self, *args, **given)
        output.metrics["eval_loss"] += 10 if step[0] > 2 else 0
        return output

    monkeypatch.setattr(StaticSteps, "run", breaks)
    monkeypatch.setattr(SFTTrainer, "evaluation_loop", worse)
    wanted = (
        f"data.eval_dataset={config.parent / 'rows.jsonl'}",
        "training.stop_early=true",
        "training.eval_steps=1",
    )
    several = [part for value in (*wanted, "training.max_steps=6") for part in ("--set", value)]
    assert main(["train", str(config), "--json", *several]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 3 < summary["steps"] < 6 and summary["eval_loss"] < 10
    assert (config.parent / "out" / "adapter").exists()


def test_resuming_with_another_rank(config, capsys):
    assert main(["train", str(config)]) == 0
    capsys.readouterr()
    said = refused(capsys, config, "--resume", "--set", "adapter.r=8", "--set", "training.max_steps=4")
    assert "[PH604]" in said and "r is 4 there and 8 here" in said


def test_other_libraries_errors(config, capsys, monkeypatch, tmp_path):
    from pronghorn.cli import unexpected
    from pronghorn.training import SFTTrainer

    monkeypatch.setattr(unexpected.tempfile, "gettempdir", lambda: str(tmp_path))

    def fails(self, *args, **kwargs):
        return torch.ones(2, 2).half() @ torch.ones(2, 2)

    monkeypatch.setattr(SFTTrainer, "training_step", fails)
    assert "[PH206] tensors of two dtypes" in refused(capsys, config)
    assert list(tmp_path.glob("pronghorn-*.log"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "eos_token=<|none|>",
            "[PH401] these training arguments do not go together: The specified `eos_token`",
        ),
        ("adam_beta1=2.0", "[PH404] adam_beta1=2.0 is outside of its range"),
        (
            "resume_from_checkpoint=out/checkpoint-1",
            "[PH401] 'training.resume_from_checkpoint' has no effect",
        ),
        ("eval_on_start=true", "[PH401] 'training.eval_on_start' needs rows to evaluate on"),
    ],
)
def test_training_arguments_that_are_refused_by_whoever_reads_them(config, capsys, setting, message):
    assert message in refused(capsys, config, "--set", f"training.{setting}")
