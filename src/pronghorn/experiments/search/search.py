"""Trials of settings on a base model that is loaded once: who is next, what came of it, which is the best."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pronghorn.errors import SearchChanged, SearchInvalid, nearest
from pronghorn.experiments.search.bench import Task, work
from pronghorn.experiments.search.footprint import Footprint
from pronghorn.experiments.search.journal import JOURNAL, Journal
from pronghorn.experiments.search.samplers import SAMPLERS, sampler_named
from pronghorn.experiments.search.space import Settings, Space
from pronghorn.experiments.search.trial import Trial, pareto, ranked
from pronghorn.experiments.short_runs import QUIET


@dataclass(frozen=True)
class SearchResult:
    """All trials of a folder, and where its best adapter is.

    Args:
        before: the held-out loss of the base, without any adapter.
    """

    trials: tuple[Trial, ...]
    before: float
    maximize: bool
    folder: Path

    @property
    def best(self) -> Trial | None:
        """The finished trial with the best score; of equal ones the first."""
        return _best(self.trials, self.maximize)

    @property
    def adapter(self) -> Path | None:
        """The best trial's adapter."""
        return None if self.best is None else adapter_folder(self.folder, self.best.number)

    @property
    def pareto(self) -> set[int]:
        """Numbers of the trials that nothing beats in score, time and memory together."""
        return pareto(self.trials, self.maximize)

    @property
    def ranked(self) -> list[Trial]:
        return ranked(self.trials, self.maximize)

    def as_dict(self) -> dict[str, Any]:
        best, front = self.best, self.pareto
        return {
            "loss_before": self.before,
            "best": None if best is None else best.number,
            "adapter": None if best is None else str(self.adapter),
            "trials": [{**trial.as_dict(), "pareto": trial.number in front} for trial in self.ranked],
        }


def search(
    task: Task,
    space: Space,
    folder: str | Path,
    *,
    sampler: str = "grid",
    trials: int | None = None,
    workers: int = 1,
    restart: bool = False,
    on_trial: Callable[[Trial], None] | None = None,
) -> SearchResult:
    """Try settings, and keep the best adapter; trials that an earlier call left in the folder are not run again.

    A trial's outcome depends on its settings alone, not on what ran before it. One that runs out of memory or whose
    loss is no number fails with the reason, and the search goes on.

    Args:
        folder: gets `trials.jsonl`, a line for every finished trial, and the best one's `adapter-N`.
        sampler: "grid" (every point), "random", or "tpe" (Optuna's, with pruning).
        trials: at most, earlier ones included; None is all points of a grid, and 20 otherwise.
        workers: processes, spread over the GPUs; those of one GPU have one base. 1 runs in this process.
        restart: forget what is in the folder.
        on_trial: is told each outcome as it comes.

    Raises:
        SearchInvalid: settings that no search can do, or workers that the memory has no room for.
        SearchChanged: the folder's trials are of another space, model, data or settings.
        SearchFailed: the metric raised, or a worker cannot begin.
        PackageMissing: the sampler tpe without Optuna.
    """
    if sampler not in SAMPLERS:
        raise SearchInvalid(
            f"there is no sampler '{sampler}'",
            fix=nearest(sampler, SAMPLERS) or f"use one of {', '.join(SAMPLERS)}",
        )
    for name, count in (("trials", 1 if trials is None else trials), ("workers", workers)):
        if count < 1:
            raise SearchInvalid(f"{name} cannot be {count}", fix="give a whole number from 1")
    # Refused before a model is loaded.
    sampler_named(sampler, space, trials, task.settings.seed, task.maximize, ())
    workers = min(workers, space.size or workers)
    referee = Umpire(task, space, Path(folder), sampler, trials, on_trial, restart)
    if workers == 1:
        work(task, space, referee)
    else:
        from pronghorn.experiments.search.workers import work_in_processes

        work_in_processes(task, space, referee, workers)
    return referee.result()


class Umpire:
    """The `Referee` of a search: asks the sampler, keeps the journal and the best adapter."""

    def __init__(
        self,
        task: Task,
        space: Space,
        folder: Path,
        sampler: str,
        trials: int | None,
        on_trial: Callable[[Trial], None] | None,
        restart: bool,
    ) -> None:
        self._task, self._space, self._folder = task, space, folder
        self._sampler_name, self._most = sampler, trials
        self._tell = on_trial
        self._facts: dict[str, str] = {}
        self._next = 0
        folder.mkdir(parents=True, exist_ok=True)
        if restart:
            (folder / JOURNAL).unlink(missing_ok=True)
            for adapter in folder.glob(adapter_folder(folder, "*").name):
                shutil.rmtree(adapter)

    def ready(self, facts: dict[str, str], before: float, found: Footprint | None) -> bool:
        """The first base opens the journal; those of other processes have to be the same."""
        if self._facts and facts != self._facts:
            name = next(name for name in facts if facts[name] != self._facts.get(name))
            raise SearchChanged(
                f"a worker has another {name} than the first one: {facts[name]}, not {self._facts[name]}",
                fix="load the same in every process",
            )
        if not self._facts:
            self._facts, self._before = facts, before
            self._journal = Journal(
                self._folder, {"space": self._space.as_dict(), **facts, **self._settings()}
            )
            done = self._journal.trials
            self._next = max((trial.number + 1 for trial in done), default=0)
            self._sampler = sampler_named(
                self._sampler_name,
                self._space,
                self._most,
                self._task.settings.seed,
                self._task.maximize,
                done,
            )
        return self._sampler.prunes

    def next(self) -> tuple[int, Settings] | None:
        settings = self._sampler.next(self._next)
        if settings is None:
            return None
        self._next += 1
        return self._next - 1, settings

    def should_prune(self, number: int, percent: int, loss: float) -> bool:
        return self._sampler.should_prune(number, percent, loss)

    def finished(self, trial: Trial) -> Path | None:
        best = _best([*self._journal.trials, trial], self._task.maximize)
        return adapter_folder(self._folder, trial.number) if best is trial else None

    def record(self, trial: Trial) -> None:
        """Only after its adapter is saved: a search that is interrupted in between runs it again."""
        self._journal.add(trial)
        self._sampler.told(trial)
        best = _best(self._journal.trials, self._task.maximize)
        for other in self._journal.trials:
            if other is not best:
                shutil.rmtree(adapter_folder(self._folder, other.number), ignore_errors=True)
        if self._tell is not None:
            self._tell(trial)

    def result(self) -> SearchResult:
        return SearchResult(tuple(self._journal.trials), self._before, self._task.maximize, self._folder)

    def _settings(self) -> dict[str, Any]:
        """What else decides about a trial's outcome."""
        args, metric = self._task.settings, self._task.metric
        decided = {*QUIET, *_OF_A_RUN, *self._space.axes}
        kept = {name: str(getattr(args, name)) for name in sorted(args.given - decided)}
        return {
            "training settings": kept,
            "adapter": {name: str(value) for name, value in self._task.adapter.items()},
            "metric": None if metric is None else getattr(metric, "__qualname__", type(metric).__name__),
        }


#: Arguments of a run that say nothing about what it trains, besides `QUIET`.
_OF_A_RUN = {"output_dir", "logging_steps", "save_steps", "eval_steps"}


def adapter_folder(folder: Path, number: int | str) -> Path:
    """Where a trial's adapter is kept."""
    return folder / f"adapter-{number}"


def _best(trials: Any, maximize: bool) -> Trial | None:
    first = next(iter(ranked(trials, maximize)), None)
    return first if first is not None and first.status == "done" else None
