"""Curves of real runs of tiny models: what is wrong is said while they train, and nothing of a healthy one."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from pronghorn import SFTConfig
from pronghorn.engine import bind
from pronghorn.training.curve_watch import CurveWatch
from pronghorn.training.ledger import StepLedger
from pronghorn.training.progress import ProgressTable
from pronghorn.tuning.curves import Finding
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.runs import trainer

ANIMALS = ["pronghorn", "grass", "eat", "land", "fast", "what"]
STONES = ["quartz", "slate", "jade", "flint", "onyx", "opal"]


def rows(words: list[str], count: int, seed: int = 0) -> Dataset:
    """Answers are drawn at random: there is nothing to learn but the words, and the rows themselves by heart."""
    draw = random.Random(seed)
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": " ".join(draw.choices(words, k=2))},
                    {"role": "assistant", "content": " ".join(draw.choices(words, k=3))},
                ]
            }
            for _ in range(count)
        ]
    )


@pytest.fixture(scope="module")
def knowing() -> Any:
    """A model that knows such rows, so that training can make it worse."""
    model, tokenizer = tiny_model("llama").train(), tiny_tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = [tokenizer.apply_chat_template(row["messages"], return_dict=False) for row in rows(ANIMALS, 128, 7)]
    for step in range(120):
        part = [ids[(16 * step + i) % len(ids)] for i in range(16)]
        batch = tokenizer.pad({"input_ids": part}, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def run_of(knowing: Any, folder: Path, words: list[str], count: int, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(knowing), LoraConfig(r=8, target_modules="all-linear"))
    bind(model)
    data = options.pop("rows", None) or rows(words, count)
    given = {
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "learning_rate": 1e-2,
        "disable_tqdm": False,
        **options,
    }
    return trainer(folder, model, data, **given)


def findings(run: Any) -> list[Finding]:
    return run._curves.findings(over=True)


def test_eight_rows_are_learned_by_heart(knowing, tmp_path, capsys):
    run = run_of(
        knowing, tmp_path, ANIMALS, 8, max_steps=200, eval_dataset=rows(ANIMALS, 16, 1), eval_strategy="steps",
        eval_steps=10, stop_early=True, save_strategy="best",
    )  # fmt: skip
    run.train()
    out = capsys.readouterr().out
    assert out.count("overfitting: The evaluation loss rose from") == 1
    assert "(stop_early)" in out and run.state.global_step < 200
    (found,) = [finding for finding in findings(run) if finding.kind == "overfitting"]
    # The best weights were saved when they were the model's, and are so again.
    assert run.args.load_best_model_at_end and run.state.best_global_step == found.best_step
    lowest = min(entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry)
    assert run.evaluate()["eval_loss"] == pytest.approx(lowest, rel=1e-4)


def test_a_rate_a_hundred_times_too_large(knowing, tmp_path, capsys):
    run = run_of(knowing, tmp_path, ANIMALS, 64, max_steps=24, learning_rate=1.0)
    run.train()
    assert capsys.readouterr().out.count("rate-too-large: The loss rose from") == 1
    assert {finding.kind for finding in findings(run)} == {"rate-too-large"}
    assert run.state.global_step == 24  # nobody asked to stop


def test_a_healthy_run_is_silent(knowing, tmp_path, capsys):
    run = run_of(
        knowing, tmp_path, STONES, 240, max_steps=60, eval_dataset=rows(STONES, 16, 1), eval_strategy="steps",
        eval_steps=10, stop_early=True, save_strategy="no",
    )  # fmt: skip
    run.train()
    assert findings(run) == [] and run.state.global_step == 60
    assert not any(word in capsys.readouterr().out for word in ("overfitting", "rate", "spike", "plateau"))


def test_the_row_of_a_spike_is_named(knowing, tmp_path, capsys):
    data = rows(ANIMALS, 80).to_list()
    data[77]["messages"][1]["content"] = "%$§ qqq zzz 12345 !!! ÄÖÜ"
    run = run_of(
        knowing, tmp_path, ANIMALS, 0, max_steps=40, rows=Dataset.from_list(data), learning_rate=1e-4,
        per_device_train_batch_size=2, logging_steps=20,
    )  # fmt: skip
    run.train()
    (found,) = [finding for finding in findings(run) if finding.kind == "spike"]
    # Logged averages of 20 steps hide it; each step's own loss does not.
    assert found.first == found.last and 77 in found.rows and len(found.rows) == 2
    assert "spike: The loss jumped" in capsys.readouterr().out


def test_without_a_progress_table_findings_are_logged(knowing, tmp_path, caplog):
    run = run_of(knowing, tmp_path, ANIMALS, 64, max_steps=12, learning_rate=1.0, disable_tqdm=True)
    assert not any(isinstance(callback, ProgressTable) for callback in run.callback_handler.callbacks)
    run.train()
    assert "rate-too-large" in caplog.text


@pytest.mark.parametrize(
    "given,best,saved",
    [
        ({"eval_strategy": "steps", "eval_steps": 5}, True, "best"),
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, True, "epoch"),
        (
            {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5},
            True,
            "steps",
        ),
        ({"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "epoch"}, False, "epoch"),
        ({"eval_strategy": "steps", "save_strategy": "no"}, False, "no"),
        ({"eval_strategy": "steps", "load_best_model_at_end": False}, False, "steps"),
        ({}, False, "steps"),
    ],
)
def test_what_stop_early_keeps(tmp_path, given, best, saved):
    """What was asked for about saving stays as it is."""
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", stop_early=True, **given)
    assert config.load_best_model_at_end == best and config.save_strategy == saved


def test_rows_of_steps_that_stand_out_are_kept():
    """Whoever reads the run later asks which rows they share. Only theirs are kept."""
    draw, ledger = random.Random(0), StepLedger()
    for step in range(1, 201):
        high = step in (60, 150)
        ledger.steps.append(step)
        ledger.losses.append(2.0 * math.exp(draw.gauss(0, 0.1)) * (1.8 if high else 1.0))
        ledger.norms.append(1.0)
        ledger._rows.append((step, (step, 7) if high else (step, -step)))
    state = SimpleNamespace(log_history=[{"step": 100, "epoch": 1.0}], max_steps=200)
    lent = SimpleNamespace(_ledger=ledger, state=state, args=SimpleNamespace(max_grad_norm=1.0))
    watch = CurveWatch(lent)
    watch.findings(over=False)
    assert watch.rows.items() >= {60: [60, 7], 150: [150, 7]}.items() and len(watch.rows) < 6


def test_curves_are_read_seldom(monkeypatch):
    """So seldom that all readings of a run cost about ten times the last one."""
    ledger, read = StepLedger(), []
    state = SimpleNamespace(log_history=[], max_steps=5000, is_world_process_zero=True)
    args = SimpleNamespace(max_grad_norm=1.0, stop_early=False)
    lent = SimpleNamespace(_ledger=ledger, state=state, args=args, is_in_train=True)
    watch = CurveWatch(lent)
    monkeypatch.setattr(watch, "findings", lambda over: read.append(len(ledger.steps)) or [])
    for step in range(1, 5001):
        ledger.steps.append(step)
        watch.on_log(args, state, None, {"loss": 1.0})
    assert len(read) < 60 and sum(read) < 11.5 * 5000
    watch.on_log(args, state, None, {"eval_loss": 1.0})
    assert read[-1] == 5000, "an evaluation is always looked at"
    lent.is_in_train = False
    watch.on_log(args, state, None, {"eval_loss": 1.0})
    assert len(read) < 61
