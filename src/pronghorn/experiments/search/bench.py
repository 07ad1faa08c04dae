"""One loaded base model, on which trial after trial puts its adapter, trains it, and takes it off again."""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from transformers.trainer_callback import TrainerCallback

from pronghorn.engine import base_causal_lm, binding_of
from pronghorn.errors import (
    BudgetTooSmall,
    DatasetUnusable,
    NonFiniteLoss,
    OutOfMemory,
    SearchFailed,
    SearchInvalid,
)
from pronghorn.experiments.search.footprint import Footprint, PeakMemory, footprint
from pronghorn.experiments.search.space import ADAPTER_KEYS, Range, Settings, Space
from pronghorn.experiments.search.swapping import adapted
from pronghorn.experiments.search.trial import Trial
from pronghorn.experiments.short_runs import short_trainer
from pronghorn.export import save_adapter
from pronghorn.loading import FastLanguageModel
from pronghorn.training import SFTConfig

logger = logging.getLogger("pronghorn")

#: A user's score: of the model with its trained adapter, the tokenizer, and the held-out rows as they were given.
Metric = Callable[[Any, Any, Any], float]

_MICRO_BATCH = "per_device_train_batch_size"
#: Of a training, the share between two looks of a sampler that prunes.
LOOK_EVERY = 1 / 3
#: Of a training, the share between two logs.
LOG_EVERY = 0.1
#: A training has diverged whose last losses are on average this many times the held-out loss before it.
DIVERGED, RECENT = 2.0, 2


@dataclass(frozen=True)
class Task:
    """What is trained and how it is judged.

    Args:
        load: gives (base model without an adapter, tokenizer). Workers call it in processes of their own, for which it
            has to be a function of a module, or a `functools.partial` of one.
        rows, held_out: data sets as `SFTTrainer` takes them.
        settings: of every training; the space's own settings take the place of its. Their `max_steps` say how many rows
            a trial sees, whatever its batch.
        adapter: arguments of `FastLanguageModel.get_peft_model`.
        metric: the score; None is the held-out loss. maximize: a higher metric is better.
    """

    load: Callable[[], tuple[Any, Any]]
    rows: Any
    held_out: Any
    settings: SFTConfig
    adapter: Mapping[str, Any] = field(default_factory=dict)
    metric: Metric | None = None
    maximize: bool = False

    def __post_init__(self) -> None:
        if not self.held_out:
            raise SearchInvalid("without held-out rows there is no score", fix="hold some back")
        if self.maximize and self.metric is None:
            raise SearchInvalid("the score is a loss, which is to be low", fix="give a metric to maximize")


class Referee(Protocol):
    """Whoever decides about trials; in this process, or at the other end of a pipe."""

    def ready(self, facts: dict[str, str], before: float, found: Footprint | None) -> bool:
        """A base is loaded, of held-out loss `before`; returns whether trainings are looked at before their end."""

    def next(self) -> tuple[int, Settings] | None: ...

    def should_prune(self, number: int, percent: int, loss: float) -> bool: ...

    def finished(self, trial: Trial) -> Path | None:
        """A trial's outcome; returns where to save its adapter, if it is the best so far."""

    def record(self, trial: Trial) -> None:
        """It is finished, and saved if it had to be."""


def work(task: Task, space: Space, referee: Referee) -> None:
    """Load the base, and try what the referee says until nothing is left."""
    bench = Bench(task, space)
    looks = referee.ready(bench.facts, bench.before, bench.footprint)
    while (job := referee.next()) is not None:
        bench.run(*job, referee, looks)


class Bench:
    """The base and the prepared rows.

    Raises:
        SearchInvalid: a micro-batch of more rows than there are.
        PronghornError: rows that cannot be trained on, or an adapter that cannot be put on.
    """

    def __init__(self, task: Task, space: Space) -> None:
        self.task, self._space = task, space
        self._base, self._tokenizer = task.load()
        name = Path(getattr(self._base, "name_or_path", "") or type(self._base).__name__).name
        #: what a search that goes on has to find again
        self._digest = digest_of_weights(self._base)
        self.facts = {"model": f"{name} ({self._digest})"}
        largest = {key: space.largest(key, None) for key in ADAPTER_KEYS if key in space.axes}
        with tempfile.TemporaryDirectory() as folder, self._adapted(largest) as model:
            trainer = short_trainer(
                model, self._tokenizer, task.rows, task.held_out, task.settings, folder, packing=False
            )
            self._rows, self._held_out = trainer.train_dataset, trainer.eval_dataset
            if not isinstance(self._rows, Dataset):
                raise DatasetUnusable("a stream of rows cannot be trained on again", fix="give a Dataset")
            batches = space.axes.get(_MICRO_BATCH, (task.settings.per_device_train_batch_size,))
            assert not isinstance(batches, Range)  # of whole numbers it is their powers of two
            batch = max(batches)
            if batch > len(self._rows):
                raise SearchInvalid(
                    f"a micro-batch of {batch} rows is more than the {len(self._rows)} there are",
                    fix=f"search smaller {_MICRO_BATCH}",
                )
            #: held-out loss of the base, as an adapter at its beginning changes nothing
            self.before = float(trainer.evaluate()["eval_loss"])
            self.footprint = footprint(trainer, batches)
            del trainer
        self.facts |= {
            "rows": digest_of_rows(self._rows),
            "held-out rows": digest_of_rows(self._held_out),
        }
        _collect()

    def run(self, number: int, settings: Settings, referee: Referee, looks: bool) -> None:
        """One trial; `looks`: the referee is asked after every third whether it is worth its end."""
        binding = binding_of(self._base)
        peak, failed = PeakMemory(0 if binding is None else binding.elsewhere), ""
        began = time.perf_counter()
        try:
            with self._adapted(settings) as model:
                trial = self._train(model, number, settings, referee if looks else None, peak)
                folder = referee.finished(trial)
                if folder is not None:
                    save_adapter(model, self._tokenizer, folder)
        except (torch.OutOfMemoryError, OutOfMemory, BudgetTooSmall, MemoryError) as error:
            failed = f"memory: {_said(error)}"
        except NonFiniteLoss as error:
            failed = _said(error)
        except RuntimeError as error:
            # torch has no class of its own for a host without memory.
            if "allocate memory" not in str(error):
                raise
            failed = f"memory: {_said(error)}"
        if failed or torch.cuda.is_available():
            _collect()  # out of the blocks above, where the error no longer keeps the trial's tensors alive
        if failed:
            trial = Trial(
                number, settings, "failed", failed, seconds=time.perf_counter() - began, memory=peak.read()
            )
        if digest_of_weights(self._base) != self._digest:
            raise SearchFailed(
                f"trial {number} has changed the base, on which all other trials are",
                fix="give a metric that leaves the model as it was: no merging",
            )
        referee.record(trial)

    def _adapted(self, settings: Settings) -> AbstractContextManager[Any]:
        own = {key: settings[key] for key in ADAPTER_KEYS if key in settings}
        return adapted(self._base, **{**self.task.adapter, **own})

    def _train(
        self, model: Any, number: int, settings: Settings, referee: Referee | None, peak: PeakMemory
    ) -> Trial:
        watch = _Watch(number, referee, self.before)
        with tempfile.TemporaryDirectory() as folder:
            trainer = short_trainer(
                model,
                self._tokenizer,
                self._rows,
                self._held_out,
                self.task.settings,
                folder,
                callbacks=[watch],
                **self._options(settings, looks=referee is not None),
            )
            trainer.train()
            log = trainer.state.log_history
            speeds = [entry["tokens_per_second"] for entry in log if "tokens_per_second" in entry]
            trial = Trial(
                number,
                settings,
                "done",
                seconds=round(watch.seconds, 3),
                steps=trainer.state.global_step,
                memory=peak.read(),
                tokens_per_second=round(statistics.median(speeds), 1) if speeds else None,
                seen=tuple(watch.seen),
            )
            if watch.failed:
                return replace(trial, status="failed", reason=watch.failed)
            if watch.pruned:
                return replace(trial, status="pruned", reason=watch.pruned, loss=watch.seen[-1][1])
            loss = float(trainer.evaluate()["eval_loss"])
            if not math.isfinite(loss):
                return replace(trial, status="failed", reason=f"the held-out loss is {loss} after training")
        score = loss if self.task.metric is None else self._scored(model, self.task.metric)
        if not math.isfinite(score):
            return replace(trial, status="failed", reason=f"the metric is {score}", loss=loss)
        return replace(trial, loss=loss, score=score)

    def _options(self, settings: Settings, looks: bool) -> dict[str, Any]:
        """The trial's arguments of SFTConfig: as many rows as the settings' own run sees."""
        options: dict[str, Any] = {key: value for key, value in settings.items() if key not in ADAPTER_KEYS}
        options |= {"logging_strategy": "steps", "logging_steps": LOG_EVERY}
        options["max_steps"] = steps_of(self.task.settings, settings)
        if looks:
            options |= {"eval_strategy": "steps", "eval_steps": LOOK_EVERY}
        return options

    def _scored(self, model: Any, metric: Metric) -> float:
        FastLanguageModel.for_inference(model)
        try:
            with torch.no_grad():
                return float(metric(model, self._tokenizer, self.task.held_out))
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            name = getattr(metric, "__qualname__", type(metric).__name__)
            raise SearchFailed(
                f"the metric {name} raised {type(error).__name__}: {error}", fix="try it on the model alone"
            ) from error
        finally:
            FastLanguageModel.for_training(model)


def steps_of(base: SFTConfig, settings: Settings) -> int:
    """Optimizer steps in which a trial sees as many rows as `base.max_steps` of its own; -1 (epochs) stays."""
    if base.max_steps <= 0:
        return -1
    keys = (_MICRO_BATCH, "gradient_accumulation_steps")
    own = math.prod(getattr(base, key) for key in keys)
    return math.ceil(base.max_steps * own / math.prod(settings.get(key, getattr(base, key)) for key in keys))


class _Watch(TrainerCallback):
    """Ends a training that has diverged, or that the referee finds not worth its end."""

    def __init__(self, number: int, referee: Referee | None, before: float) -> None:
        self._number, self._referee, self._limit = number, referee, DIVERGED * before
        self._losses: list[float] = []
        self.seen: list[tuple[int, float]] = []
        #: from the first step to the last, evaluations left out
        self.seconds = 0.0
        self.failed = self.pruned = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds -= time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        self._losses.append(float(logs["loss"]))
        recent = self._losses[-RECENT:]
        if not all(math.isfinite(loss) for loss in recent):
            self.failed = f"the loss is {recent[-1]} at step {state.global_step}"
        elif len(recent) == RECENT and sum(recent) / RECENT > self._limit:
            self.failed = (
                f"the loss diverged: {recent[-1]:.2f} at step {state.global_step}, "
                f"{self._limit / DIVERGED:.2f} before training"
            )
        control.should_training_stop |= bool(self.failed)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if metrics is None or self._referee is None or self.failed:
            return
        self.seconds -= metrics["eval_runtime"]
        loss, percent = float(metrics["eval_loss"]), round(100 * state.global_step / state.max_steps)
        if percent == 100:
            return
        if not math.isfinite(loss):
            self.failed = f"the held-out loss is {loss} at step {state.global_step}"
        else:
            self.seen.append((percent, loss))
            if self._referee.should_prune(self._number, percent, loss):
                self.pruned = f"held-out loss {loss:.4f} after {percent} %: worse than the others' median"
        control.should_training_stop |= bool(self.failed or self.pruned)


def digest_of_weights(model: Any) -> str:
    """A short name for a model's weights: a thousand elements of each parameter, with its shape and type."""
    found = hashlib.sha256()
    for name, parameter in base_causal_lm(model).named_parameters():
        values = parameter.detach().reshape(-1)
        some = values[:: max(values.numel() // 1024, 1)].contiguous().view(torch.uint8).cpu()
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        found.update(some.numpy().tobytes())
    return found.hexdigest()[:12]


def digest_of_rows(rows: Dataset) -> str:
    """Their number and a short name for their tokens and labels."""
    found = hashlib.sha256()
    for row in rows.select_columns(["input_ids", "labels"]):
        found.update(repr((row["input_ids"], row["labels"])).encode())
    return f"{len(rows)} rows ({found.hexdigest()[:12]})"


def _said(error: BaseException) -> str:
    return str(getattr(error, "message", None) or error).partition("\n")[0]


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
