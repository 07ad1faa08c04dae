"""What a run leaves: run.json and report.html, after success, failure and interruption, and what they tell."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from pronghorn import SFTConfig
from pronghorn.errors import NonFiniteLoss, PackageMissing, UnknownArgument
from pronghorn.pages import write_whole
from pronghorn.training.ledger import StepLedger
from pronghorn.training.report.page import report_page
from pronghorn.training.report.samples import Prompt, answers, prompts_of
from pronghorn.tuning.run_record import RunRecord, load_run
from tests.pages.browser import ask, needs_chromium
from tests.pages.test_pages import EVIL
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.runs import adapter_model, chats, losses, trainer

TOLD = {"report": True, "optim": "adamw_torch", "learning_rate": 5e-3, "warmup_steps": 2}


def source_of(record: RunRecord, name: str) -> tuple[Any, str]:
    setting = next(item for item in record.settings if item.name == name)
    return setting.value, setting.source


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Any:
    """A run of 22 steps with evaluations, and the folder it left."""
    folder = tmp_path_factory.mktemp("report")
    run = trainer(
        folder, max_steps=22, eval_dataset=chats(4), eval_strategy="steps", eval_steps=8, logging_steps=3,
        hub_token="hf_secret", model_init_kwargs={"token": "hf_secret"}, max_length="auto", **TOLD,
    )  # fmt: skip
    run.train()
    return run


def test_what_the_record_holds(done):
    record = load_run(done.args.output_dir)
    assert record.state == "finished" and record.max_steps == 22 and record.seconds > 0
    assert record.steps == list(range(1, 23)) and record.step_losses == list(done._ledger.losses)
    # Every step's loss, where logs have averages of three.
    assert losses(done)[0] == pytest.approx(sum(record.step_losses[:3]) / 3, rel=1e-5)
    assert all(norm > 0 for norm in record.step_norms)
    assert source_of(record, "learning_rate") == (5e-3, "given")
    assert source_of(record, "weight_decay")[1] == "default"
    assert source_of(record, "max_length") == (done.args.max_length, "planned")
    assert source_of(record, "adapter r") == (4, "given")
    assert source_of(record, "save levels of the layers")[1] in ("planned", "given")
    training = record.data["training"]
    lengths = [len(row["input_ids"]) for row in done.train_dataset]
    assert (training["rows"], training["tokens"], training["longest"]) == (12, sum(lengths), max(lengths))
    supervised = sum(label != -100 for row in done.train_dataset for label in row["labels"])
    assert training["supervised share"] == pytest.approx(supervised / sum(lengths), abs=1e-4)
    assert record.data["evaluation"]["rows"] == 4
    assert record.model["trained parameters"] == sum(
        p.numel() for p in done.model.parameters() if p.requires_grad
    )
    assert "attention" in record.model["engine"] and record.environment["torch"]
    assert len(record.memory) >= 7 and all(0 < now <= most * 1.01 for _, now, most in record.memory)
    assert record.planned_memory is None  # a plan is for a GPU's memory
    assert len(record.samples) == 3 and all(sample.prompt and sample.expected for sample in record.samples)
    assert any(sample.before != sample.after for sample in record.samples)


def test_no_secret_is_written(done):
    for name in ("run.json", "report.html"):
        assert "hf_secret" not in (Path(done.args.output_dir) / name).read_text()


def test_the_page_needs_nothing_else(done):
    page = (Path(done.args.output_dir) / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    for text in (
        "Loss",
        "Gradient norm",
        "Learning rate",
        "Tokens per second",
        "Before and after",
        "learning_rate",
    ):
        assert text in page
    assert page.count("<figure") == 5 and "nan" not in page.split("<h2>Settings")[0]


def test_an_evaluation_afterwards_belongs_to_the_run(done):
    seconds = load_run(done.args.output_dir).seconds
    value = done.evaluate()["eval_loss"]
    record = load_run(done.args.output_dir)
    assert record.log[-1]["eval_loss"] == value and record.seconds == seconds and record.state == "finished"


def test_a_report_changes_nothing(done, tmp_path):
    """Answers are generated before training: neither weights nor the order of random numbers may notice."""
    plain = trainer(
        tmp_path, max_steps=22, eval_dataset=chats(4), eval_strategy="steps", eval_steps=8, logging_steps=3,
        **{**TOLD, "report": False},
    )  # fmt: skip
    plain.train()
    assert losses(plain) == losses(done)[: len(losses(plain))]
    assert list(tmp_path.iterdir()) == []


class Ends(TrainerCallback):
    def __init__(self, how: BaseException | None) -> None:
        self.how = how

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            if self.how is not None:
                raise self.how
            control.should_training_stop = True


@pytest.mark.parametrize(
    "how,state",
    [
        (KeyboardInterrupt(), "interrupted"),
        (ValueError(f"broken {EVIL}"), "failed: ValueError"),
        (None, "stopped"),
    ],
)
def test_a_run_that_ends_otherwise_says_how(tmp_path, how, state):
    run = trainer(tmp_path, max_steps=9, callbacks=[Ends(how)], **TOLD)
    if how is None:
        run.train()
    else:
        with pytest.raises(type(how)):
            run.train()
    assert load_run(tmp_path).state.startswith(state)
    assert "no held-out rows to take prompts from" in load_run(tmp_path).notes[0]
    page = (tmp_path / "report.html").read_text()
    assert state.split(":")[0] in page and "<script>window" not in page


class Breaks(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("inf")


def test_a_run_that_ends_by_a_loss_that_is_no_number_keeps_it(tmp_path):
    """Also what came after the last log."""
    run = trainer(tmp_path, max_steps=9, callbacks=[Breaks()], logging_steps=50, **TOLD)
    with pytest.raises(NonFiniteLoss):
        run.train()
    record = load_run(tmp_path)
    assert record.state.startswith("failed: NonFiniteLoss") and record.steps == [1, 2, 3, 4]
    assert [math.isfinite(loss) for loss in record.step_losses] == [True, True, True, False]
    (found,) = [finding for finding in record.findings if finding["kind"] == "not-a-number"]
    assert found["first"] == 4 and found["rows"] == record.rows[4] != []


def test_a_report_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    (tmp_path / "report.html").mkdir()
    run = trainer(tmp_path, max_steps=2, **TOLD)
    with caplog.at_level(logging.WARNING, "pronghorn"):
        run.train()
    assert run.state.global_step == 2 and "report could not be written" in caplog.text


def test_a_resumed_run_keeps_what_was_before(tmp_path):
    first = trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, **TOLD)
    first.train()
    before = load_run(tmp_path)
    run = trainer(tmp_path, max_steps=6, save_strategy="steps", save_steps=2, **TOLD)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    record = load_run(tmp_path)
    assert record.steps == [1, 2, 3, 4, 5, 6] and record.step_losses[:2] == before.step_losses[:2]
    assert [step for step, *_ in record.memory] == [
        1,
        2,
        3,
        4,
        5,
        6,
        6,
    ] and "Resumed at step 2" in record.notes[0]


def test_arguments_of_another_kind_keep_their_sources(tmp_path):
    import trl

    from pronghorn.training.config import as_sft_config

    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, learning_rate=3e-4, max_steps=7)
    given = as_sft_config(args).given
    assert {"learning_rate", "max_steps", "output_dir"} <= given and "weight_decay" not in given
    config = SFTConfig(output_dir=str(tmp_path), seed=1, stop_early=False)
    assert config.given == {"output_dir", "seed", "stop_early"}
    # Who gives every name, as a parser does, has chosen what differs from the defaults.
    assert {"output_dir", "seed"} <= dataclasses.replace(config).given
    assert "stop_early" not in dataclasses.replace(config).given


def test_a_run_that_never_began_leaves_the_report_of_the_one_before(done, monkeypatch):
    before = load_run(done.args.output_dir)
    run = trainer(Path(done.args.output_dir), max_steps=2, **TOLD)
    monkeypatch.setattr(run, "get_train_dataloader", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert load_run(done.args.output_dir) == before


def tensorboard_losses(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = folder.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file)).Reload()
    assert "train/grad_norm" in events.Tags()["scalars"]
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def wandb_losses(folder: Path) -> list[tuple[int, float]]:
    """The last one: what the run's file holds is W&B's own format."""
    import wandb

    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    summary = wandb.run.summary
    last = [(summary["train/global_step"], summary["train/loss"])]
    wandb.finish()
    return last


def trackio_losses(folder: Path) -> list[tuple[int, float]]:
    (file,) = folder.rglob("*.db")
    rows = sqlite3.connect(file).execute("select metrics from metrics order by step").fetchall()
    entries = [json.loads(metrics) for (metrics,) in rows]
    return [(entry["train/global_step"], entry["train/loss"]) for entry in entries if "train/loss" in entry]


@pytest.mark.parametrize("read", [tensorboard_losses, wandb_losses, trackio_losses])
def test_other_reports_get_what_is_logged(tmp_path, monkeypatch, read):
    """Through Transformers' own callbacks, offline."""
    package = read.__name__.partition("_")[0]
    for name, value in {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": tmp_path, "TRACKIO_DIR": tmp_path / "trackio",
        "TENSORBOARD_LOGGING_DIR": tmp_path / "tensorboard",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    pytest.importorskip(package)
    run = trainer(tmp_path, max_steps=3, **{**TOLD, "report_to": package})
    run.train()
    logged = [(entry["step"], entry["loss"]) for entry in run.state.log_history if "loss" in entry]
    seen = read(tmp_path)
    assert len(logged) == 3 and len(seen) == (1 if package == "wandb" else 3)
    for told, known in zip(seen, logged[-len(seen) :], strict=True):
        assert told == pytest.approx(known, rel=1e-6)
    assert (tmp_path / "report.html").is_file()


def test_reports_that_cannot_be_are_refused_before_a_model_is_loaded(monkeypatch):
    with pytest.raises(UnknownArgument, match=r"report_to cannot be 'wandbs'.*did you mean 'wandb'"):
        SFTConfig(report_to="wandbs")
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: False)
    with pytest.raises(PackageMissing, match=r"needs the package trackio.*pip install trackio"):
        SFTConfig(report_to=["trackio"])


def test_callbacks_of_others_see_every_log(tmp_path):
    """W&B, trackio and the others are such callbacks, given what Transformers logs and what this trainer adds."""
    seen: list[dict[str, Any]] = []

    class Others(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    run = trainer(tmp_path, max_steps=3, callbacks=[Others()], **TOLD)
    run.train()
    assert len(seen) == 4
    assert all(
        {"loss", "grad_norm", "learning_rate", "tokens_per_second"} <= logs.keys() for logs in seen[:3]
    )
    assert all(isinstance(value, int | float) for logs in seen for value in logs.values())


def test_prompts_are_what_stands_before_an_answer():
    tokens = {"input_ids": [5, 6, 7, 8, 9, 5], "labels": [-100, -100, 7, 8, -100, 5]}
    text = {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]}
    packed = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "seq_lengths": [2, 2]}
    nothing = {"input_ids": [5, 6], "labels": [-100, -100]}
    assert prompts_of([tokens, nothing, text], 9) == [Prompt((5, 6), (7, 8)), Prompt((1, 2), (3, 4))]
    assert prompts_of([packed], 1) == [Prompt((5,), (6,))]


def test_answers_leave_model_and_random_numbers_as_they_were():
    model = tiny_model("llama").train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    prompts = [Prompt((5, 6, 7), (8,)), Prompt((9,), (8,))]
    first = answers(model, tiny_tokenizer(), prompts)
    assert model.training and torch.equal(torch.rand(2), expected)
    # A prompt's answer does not depend on the ones beside it.
    assert answers(model, tiny_tokenizer(), prompts[1:]) == first[1:]


def evil_record() -> RunRecord:
    from pronghorn.tuning.run_record import Sample, Setting

    return RunRecord(
        name=EVIL, state=f"failed: {EVIL}", began=EVIL, max_steps=9, seconds=3.0,
        settings=[Setting(EVIL, EVIL, "given", EVIL), Setting(EVIL, {EVIL: [EVIL]}, "default")],
        data={EVIL: {"rows": 3, EVIL: 4}}, model={"name": EVIL, "engine": EVIL, "parameters": 3, "dtype": EVIL},
        environment={EVIL: EVIL}, notes=[EVIL], samples=[Sample(EVIL, EVIL, EVIL, EVIL)],
        log=[{"step": step, "loss": 2.0 / step, f"eval_{EVIL}_loss": 1.0, "grad_norm": 1.0} for step in range(1, 9)],
        findings=[{"kind": EVIL, "level": EVIL, "curve": "loss", "first": 2, "last": 4, "what": EVIL, "advice": EVIL}],
        memory=[(1, 2**30, 2**31), (8, 2**30, 2**31)], memory_of=EVIL, planned_memory=2**31,
    )  # fmt: skip


def test_nothing_of_others_texts_acts_in_the_page():
    page = report_page(evil_record())
    assert page.count("<script") == 1 and "<img" not in page and "\u202e" not in page
    assert "+0.0%" in page  # memory against the plan


@needs_chromium
@pytest.mark.parametrize("width,dark", [(1200, False), (360, True)])
def test_in_a_browser(done, tmp_path, width, dark):
    said = ask(Path(done.args.output_dir) / "report.html", tmp_path, width=width, dark=dark)
    assert said["needs"] <= width, "the page is wider than the window"
    assert said["small"] == 0, "texts too small to read"
    assert said["links"] == said["images"] == 0
    shade = [int(part) for part in said["background"].removeprefix("rgb(").rstrip(")").split(",")]
    assert (max(shade) < 60) == dark
    assert "evaluation: first" in said["before"] and said["after"] == said["before"]
    assert said["readout"].startswith("step 1") and "training loss" in said["readout"]


@needs_chromium
def test_nothing_of_others_texts_acts_in_a_browser(tmp_path):
    write_whole(report_page(evil_record()), tmp_path / "evil.html")
    said = ask(tmp_path / "evil.html", tmp_path, width=360)
    assert not said["ran"] and said["images"] == 0 and said["links"] == 0
    assert said["needs"] <= 360 and said["readout"].startswith("step")


def test_a_stock_forward_is_reported_too(tmp_path):
    run = trainer(
        tmp_path, adapter_model(bound=False), max_steps=1, rows=Dataset.from_list(chats(4).to_list()), **TOLD
    )
    run.train()
    assert load_run(tmp_path).state == "finished"


def test_long_runs_are_kept_as_averages():
    ledger = StepLedger()
    ledger.take_over(range(1, 11), [float(n) for n in range(10)], [1.0] * 10)
    assert ledger.averaged(10) == (list(range(1, 11)), list(map(float, range(10))), [1.0] * 10)
    assert ledger.averaged(5) == ([2, 4, 6, 8, 10], [0.5, 2.5, 4.5, 6.5, 8.5], [1.0] * 5)
    assert ledger.averaged(4)[0] == [3, 6, 9]


def test_a_steps_loss_is_that_of_all_its_micro_batches(tmp_path):
    run = trainer(tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    run.train()
    assert list(run._ledger.losses) == pytest.approx(losses(run), rel=1e-5)
    norms = [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry]
    assert list(run._ledger.norms) == pytest.approx(norms, rel=1e-5)
    rows = run._ledger.rows()
    assert sorted(rows[1] + rows[2]) == list(range(12))
    # Who took the rows out of a file knows them by other numbers.
    run.row_numbers = [100 + n for n in range(12)]
    run.train()
    rows = run._ledger.rows()
    assert sorted(rows[1] + rows[2]) == list(range(100, 112))
