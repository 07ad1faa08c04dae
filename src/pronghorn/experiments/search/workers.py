"""Trials in several processes, each with a base of its own: over the GPUs, and where the plan allows it on one of them.

A worker asks the process that searches for what is next, and tells it what came of it; there alone decisions are made
and files are written. Threads would not do: two trainings in one process share random numbers and the GPU's stream.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from pronghorn.errors import PronghornError, SearchFailed, SearchInvalid
from pronghorn.experiments.search.bench import Referee, Task, work
from pronghorn.experiments.search.footprint import Footprint
from pronghorn.experiments.search.space import Settings, Space
from pronghorn.experiments.search.trial import Trial
from pronghorn.memory import parse_budget
from pronghorn.memory.gpus import GIB

logger = logging.getLogger("pronghorn")

#: Seconds that a worker without work may take to end.
_GOODBYE = 10.0

#: A trial's number and its settings.
Job = tuple[int, Settings]


@dataclass(frozen=True)
class Place:
    """Where a worker runs.

    Args:
        gpu: the GPU as CUDA_VISIBLE_DEVICES names it, empty where there is but one; None without any.
        sharing: workers there.
    """

    gpu: str | None
    sharing: int

    def settle(self, task: Task) -> Task:
        """In the worker, before it touches a GPU: take its share. Returns the task for it."""
        if self.gpu is None:
            torch.set_num_threads(max(torch.get_num_threads() // self.sharing, 1))
            return task
        if self.gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        if self.sharing == 1:
            return task
        # A plan for what is free now would count on what the others are about to take.
        torch.cuda.set_per_process_memory_fraction(1 / self.sharing)
        settings = copy.copy(task.settings)
        if settings.memory_budget in (None, "auto"):
            settings.memory_budget = parse_budget("auto", torch.cuda.mem_get_info()[1] // self.sharing)
        return replace(task, settings=settings)


def places(count: int) -> list[Place]:
    """Workers dealt out over the GPUs, the first ones first."""
    if not torch.cuda.is_available():
        return [Place(None, count)] * count
    there = range(torch.cuda.device_count())
    gpus = (
        [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in there] if len(there) > 1 else [""]
    )
    dealt = [gpus[index % len(gpus)] for index in range(count)]
    return [Place(gpu, dealt.count(gpu)) for gpu in dealt]


class _Worker:
    """A worker's process, whether it has its base, and the trial it is at."""

    def __init__(self, task: Task, space: Space, place: Place) -> None:
        context = multiprocessing.get_context("spawn")
        self.place = place
        self.ready = False
        self.job: Job | None = None
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(theirs, task, space, place), daemon=True)
        try:
            self.process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise SearchInvalid(
                f"a process of its own cannot be given this: {error}",
                fix="let load and metric be functions of a module, or functools.partial of one; or one worker",
            ) from None
        theirs.close()

    def stop(self) -> None:
        self.connection.close()
        if self.process.is_alive():
            self.process.terminate()
        self.process.join()


def work_in_processes(task: Task, space: Space, referee: Referee, count: int) -> None:
    """`work` in `count` processes; the others begin when the first has loaded the base and the memory is known to do.

    Where a process dies at a trial (killed, or out of the host's memory), another takes its place, and the trial is
    run once more: a second death makes it a failed one.

    Raises:
        SearchInvalid: workers that share a GPU, or the host, for which its memory is too small.
        SearchFailed: a worker died before it had its base, or raised an error that is not the trial's.
    """
    where, *others = places(count)
    deaths = Deaths()
    with _stopped([_Worker(task, space, where)]) as workers:
        while workers:
            for connection in wait([worker.connection for worker in workers]):
                worker = next(one for one in workers if one.connection is connection)
                try:
                    name, arguments = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    workers.remove(worker)
                    worker.stop()
                    deaths.mourn(worker, referee)
                    workers.append(_Worker(task, space, worker.place))
                    continue
                if name == "end":
                    workers.remove(worker)
                    worker.process.join(_GOODBYE)
                    worker.stop()
                    continue
                if name == "ready" and others:
                    check_room(where, arguments[-1])
                    workers += [_Worker(task, space, place) for place in others]
                    others = []
                _serve(worker, referee, deaths, name, arguments)


def _serve(worker: _Worker, referee: Referee, deaths: Deaths, name: str, arguments: tuple[Any, ...]) -> None:
    if name == "raised":
        raise arguments[0]
    if name == "next":
        answer = worker.job = deaths.next() or referee.next()
    else:
        answer = getattr(referee, name)(*arguments)
    if name == "ready":
        worker.ready = True
    elif name == "record":
        worker.job = None
    worker.connection.send(answer)


class Deaths:
    """Trials whose processes died: who is tried once more, and who has failed."""

    def __init__(self) -> None:
        self._again: list[Job] = []
        self._tried: set[int] = set()

    def next(self) -> Job | None:
        """A trial to be run once more."""
        return self._again.pop() if self._again else None

    def mourn(self, worker: _Worker, referee: Referee) -> None:
        """A process is gone.

        Raises:
            SearchFailed: before it had its base, which another would not get either.
        """
        code = worker.process.exitcode
        reason = f"its process ended with exit code {code}" + (
            ": killed, as when memory runs out" if code == -9 else ""
        )
        if not worker.ready:
            raise SearchFailed(f"a worker could not begin: {reason}", fix="fewer workers, or try it with one")
        if worker.job is None:
            return
        number, settings = worker.job
        if number in self._tried:
            referee.record(Trial(number, settings, "failed", f"twice, {reason}"))
            return
        logger.warning("pronghorn: trial %d is run once more: %s", number, reason)
        self._tried.add(number)
        self._again.append(worker.job)


def check_room(place: Place, found: Footprint | None) -> None:
    """Whether the workers of a place fit, by what the largest trial is predicted to take at least; says so.

    Raises:
        SearchInvalid: they do not.
    """
    where = "the host's memory" if place.gpu is None else "one GPU"
    if found is None:
        logger.warning(
            "pronghorn: %d workers share %s; what they take cannot be predicted for this model",
            place.sharing,
            where,
        )
        return
    each, there = found.needed / GIB, found.available / GIB
    if place.sharing * found.needed > found.available:
        raise SearchInvalid(
            f"{place.sharing} workers share {where} of {there:.2f} GiB, and the largest trial is predicted to take "
            f"{each:.2f} GiB at least",
            fix=f"{max(found.available // found.needed, 1)} there at most, or smaller micro-batches",
        )
    logger.warning(
        "pronghorn: %d workers share %s of %.2f GiB: %.2f GiB at least are predicted for the largest trial",
        place.sharing, where, there, each,
    )  # fmt: skip


@contextmanager
def _stopped(workers: list[_Worker]) -> Iterator[list[_Worker]]:
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stop()


class _Remote:
    """The `Referee` at the other end of a pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def _ask(self, name: str, *arguments: Any) -> Any:
        self._connection.send((name, arguments))
        return self._connection.recv()

    def ready(self, facts: dict[str, str], before: float, found: Footprint | None) -> bool:
        return bool(self._ask("ready", facts, before, found))

    def next(self) -> tuple[int, Settings] | None:
        return self._ask("next")  # type: ignore[no-any-return]

    def should_prune(self, number: int, percent: int, loss: float) -> bool:
        return bool(self._ask("should_prune", number, percent, loss))

    def finished(self, trial: Trial) -> Path | None:
        return self._ask("finished", trial)  # type: ignore[no-any-return]

    def record(self, trial: Trial) -> None:
        self._ask("record", trial)


def _run(connection: Connection, task: Task, space: Space, place: Place) -> None:
    """A worker's process. An interrupt is for the process that searches, which ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work(place.settle(task), space, _Remote(connection))
        connection.send(("end", ()))
    except (EOFError, BrokenPipeError):
        return  # whoever searches is gone
    except PronghornError as error:
        connection.send(("raised", (error,)))
    except Exception as error:
        failed = SearchFailed(
            f"a worker raised {type(error).__name__}: {error}", fix="try it with one worker"
        )
        connection.send(("raised", (failed,)))
