"""Keeps what a run's report needs while it trains, and writes it: at every checkpoint, at the end, after an error."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from pronghorn.engine import binding_of
from pronghorn.errors import RunUnreadable
from pronghorn.pages import write_whole
from pronghorn.training.curve_watch import MOST_POINTS
from pronghorn.training.memory import largest_batch, planned_reserved
from pronghorn.training.progress import memory_now_bytes, peak_memory_gib
from pronghorn.training.report.facts import data_facts, environment_facts, model_facts, settings_of
from pronghorn.training.report.page import report_page
from pronghorn.training.report.samples import Prompt, answers, held_out_rows, prompts_of, why_none
from pronghorn.tuning.run_record import RECORD, RunRecord, Sample, load_run

logger = logging.getLogger("pronghorn")

REPORT = "report.html"
#: At a checkpoint a report is written when this many times as long has gone by as writing the last one took.
_TIMES_WRITING = 200


class RunRecorder(TrainerCallback):
    """One trainer's report. A report that cannot be made is told once, and training goes on.

    Args:
        asked: the trainer's arguments as they were given, by `facts.values_of`.
    """

    takes_late_logs = True

    def __init__(self, trainer: Any, asked: Mapping[str, Any]) -> None:
        self._trainer, self._asked = trainer, asked
        self._record = RunRecord()
        self._began = 0.0
        self._prompts: list[Prompt] = []
        self._before: list[str] = []
        self._ended = False
        self._next_write = 0.0

    @contextmanager
    def of_run(self) -> Iterator[None]:
        """Around `train`: the report says how the run ended."""
        self._record, self._ended, self._began = RunRecord(), False, time.perf_counter()
        self._record.began = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            if isinstance(error, Exception):
                with self._telling("completed"):
                    self._trainer._ledger.read_rest(
                        self._trainer.accelerator, self._trainer.state.global_step + 1
                    )
            self._end("interrupted" if stopped else f"failed: {type(error).__name__}: {error}")
            raise
        state, ended_by = self._trainer.state, self._trainer._curves.ended_by
        if ended_by is not None:
            self._end(f"stopped early: {ended_by.kind}")
        else:
            self._end("finished" if state.global_step >= state.max_steps else "stopped")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        with self._telling("begun"):
            record = self._record
            record.name = Path(args.output_dir).resolve().name
            record.max_steps = state.max_steps
            if state.global_step:
                self._go_on(Path(args.output_dir), state.global_step)
            record.data = {"training": data_facts(self._trainer.train_dataset)}
            rows = self._trainer.eval_dataset
            for name, part in rows.items() if isinstance(rows, dict) else [("evaluation", rows)]:
                record.data[name] = data_facts(part) if part is not None else {}
            record.environment = environment_facts(self._trainer)
            cuda = args.device.type == "cuda"
            record.memory_of = "memory reserved on the GPU" if cuda else "memory of the process"
            reason = why_none(self._trainer)
            if reason is None:
                self._prompts = prompts_of(held_out_rows(self._trainer), args.report_samples)
                self._before = self._answers()
            else:
                record.notes.append(f"No answers before and after: {reason}.")

    def _go_on(self, folder: Path, step: int) -> None:
        """Take over what the record of the run knows of the steps before its checkpoint."""
        self._record.notes.append(f"Resumed at step {step:,}; answers before training are from there.")
        try:
            earlier = load_run(folder / RECORD)
        except RunUnreadable:
            return
        count = sum(known <= step for known in earlier.steps)
        self._trainer._ledger.take_over(
            earlier.steps[:count], earlier.step_losses[:count], earlier.step_norms[:count]
        )
        self._trainer._curves.rows |= {known: rows for known, rows in earlier.rows.items() if known <= step}
        self._record.memory = [entry for entry in earlier.memory if entry[0] <= step]

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            most = int(peak_memory_gib() * 2**30)
            now = memory_now_bytes(args.device.type == "cuda")
            self._record.memory.append((state.global_step, now, most))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.perf_counter() >= self._next_write:
            self._write()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._ended:  # an evaluation of the trained model belongs to its run
            self._write()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._prompts and self._before:
            with self._telling("finished"):
                texts = self._trainer.processing_class
                self._record.samples = [
                    Sample(texts.decode(prompt.ids), texts.decode(prompt.expected), before, after)
                    for prompt, before, after in zip(
                        self._prompts, self._before, self._answers(), strict=True
                    )
                ]

    def _answers(self) -> list[str]:
        trainer = self._trainer
        if not self._prompts:
            return []
        model, texts = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
        work = partial(answers, model, texts, self._prompts)
        return work() if trainer._steps is None else trainer._steps.beside(work)

    def _end(self, how: str) -> None:
        self._record.state = how
        if self._trainer.state.global_step:  # a run that never began leaves the report of the one before it
            self._write()
        self._ended = True

    def _write(self) -> None:
        trainer = self._trainer
        if not trainer.state.is_world_process_zero:
            return
        began = time.perf_counter()
        with self._telling("written"):
            record = self._record
            if not self._ended:
                record.seconds = round(time.perf_counter() - self._began, 2)
            record.settings = settings_of(trainer, self._asked)
            record.model = model_facts(trainer.model)
            record.log = list(trainer.state.log_history)
            record.steps, record.step_losses, record.step_norms = trainer._ledger.averaged(MOST_POINTS)
            record.planned_memory = self._planned()
            watch = trainer._curves
            record.findings = [
                finding.as_dict() for finding in watch.findings(over=record.state != "running")
            ]
            record.rows = watch.rows
            told = trainer._numbers.told
            if told and told not in record.notes:
                record.notes.append(told)
            folder = Path(trainer.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            record.save(folder)
            write_whole(report_page(record), folder / REPORT)
        now = time.perf_counter()
        self._next_write = now + _TIMES_WRITING * (now - began)

    def _planned(self) -> int | None:
        """Bytes that the memory plan expects to be reserved, where there is one for a GPU."""
        trainer = self._trainer
        binding, batch = binding_of(trainer.model), largest_batch(trainer)
        if trainer.args.device.type != "cuda" or binding is None or not binding.bound or batch is None:
            return None
        return planned_reserved(binding, batch, torch.cuda.get_device_capability(trainer.args.device))

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """A report is beside the run: what goes wrong with it is said, and ends nothing."""
        try:
            yield
        except Exception as error:
            logger.warning(
                "pronghorn: the run's report could not be %s: %s: %s", what, type(error).__name__, error
            )
