"""Trials in several processes: over the GPUs, and where the plan allows it side by side on one of them, on one base.

A worker asks the process that searches for what is next, and tells it what came of it; there alone decisions are made
and files are written. Threads would not do: two trainings in one process share random numbers and the GPU's stream.

The first worker of a place loads the base and hands it to the others (`sharing`). On a GPU it is there only while that
process lives, so that one stays until the others have ended; if it dies, they begin anew with another first one.
"""

from __future__ import annotations

import logging
import multiprocessing
import pickle
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

import torch

from pronghorn.errors import SearchFailed, SearchInvalid
from pronghorn.experiments.search.bench import Referee, Task
from pronghorn.experiments.search.footprint import Footprint
from pronghorn.experiments.search.sharing import SharedBase
from pronghorn.experiments.search.space import Settings, Space
from pronghorn.experiments.search.trial import Trial
from pronghorn.experiments.search.worker import Place, run_worker
from pronghorn.memory.gpus import GIB

logger = logging.getLogger("pronghorn")

#: Seconds that a worker without work may take to end.
_GOODBYE = 10.0

#: Seconds that a process which is killed may take to be gone.
_LAST_BREATH = 2.0

#: A trial's number and its settings.
Job = tuple[int, Settings]


def places(count: int) -> list[Place]:
    """Where so many workers run, dealt out over the GPUs, the first ones first; each place once."""
    if not torch.cuda.is_available():
        return [Place(None, count)]
    there = range(torch.cuda.device_count())
    gpus = (
        [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in there] if len(there) > 1 else [""]
    )
    return [
        Place(gpu, sharing)
        for index, gpu in enumerate(gpus)
        if (sharing := len(range(index, count, len(gpus))))
    ]


class _Worker:
    """A worker's process as the one that searches sees it.

    Args:
        base: what it opens instead of loading one. hands: it loads one for the others of its place.
    """

    def __init__(self, task: Task, space: Space, place: Place, base: SharedBase | None, hands: bool) -> None:
        context = multiprocessing.get_context("spawn")
        #: it has its base; it has nothing left to do, but others have its base open
        self.ready = self.resting = False
        #: others have, or can have, its base open; it has the first one's open
        self.handed, self.borrows = False, base is not None
        self.job: Job | None = None
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=run_worker, args=(theirs, task, space, place, base, hands), daemon=True
        )
        try:
            self.process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise SearchInvalid(
                f"a process of its own cannot be given this: {error}",
                fix="let load and metric be functions of a module, or functools.partial of one; or one worker",
            ) from None
        theirs.close()

    def dismiss(self) -> None:
        """It has nothing left to do, and time to end."""
        self.connection.close()
        self.process.join(_GOODBYE)
        self.stop()

    def stop(self) -> None:
        self.connection.close()
        if self.process.is_alive():
            self.process.terminate()
        self.process.join()


@dataclass
class _Party:
    """The workers of a place.

    Args:
        wanted: how many are to run; one less for each that has found nothing left to do.
        base: what the first has handed to the others; None where each has its own.
        found: what the first predicts.
        open: the first has its base, and there is room for the others.
    """

    place: Place
    wanted: int
    workers: list[_Worker] = field(default_factory=list)
    base: SharedBase | None = None
    found: Footprint | None = None
    open: bool = False

    @property
    def missing(self) -> int:
        running = sum(not worker.resting for worker in self.workers)
        return min(self.wanted, self.place.sharing if self.open else 1) - running

    def forget_base(self) -> None:
        if self.base is not None:
            self.base.close()
            self.base = None


def work_in_processes(task: Task, space: Space, referee: Referee, count: int) -> None:
    """`work` in `count` processes; the others begin when the first has loaded the base and the memory is known to do.

    Where a process dies at a trial (killed, or out of the host's memory), another takes its place, and the trial is
    run once more: a second death makes it a failed one.

    Raises:
        SearchInvalid: workers that share a GPU, or the host, for which its memory is too small.
        SearchFailed: a worker died before it had its base, or raised an error that is not the trial's.
    """
    crew = _Crew(task, space, referee, count)
    try:
        crew.run()
    finally:
        crew.stop()


class _Crew:
    """The workers of all places, and what they ask for."""

    def __init__(self, task: Task, space: Space, referee: Referee, count: int) -> None:
        self._task, self._space, self._referee = task, space, referee
        self._parties = [_Party(place, place.sharing) for place in places(count)]
        self._deaths = Deaths()

    def run(self) -> None:
        self._fill(self._parties[0])
        while workers := [worker for party in self._parties for worker in party.workers]:
            for connection in wait([worker.connection for worker in workers]):
                party, worker = self._whose(connection)
                if worker is None:
                    continue  # it was ended meanwhile, with the one whose base it had
                try:
                    name, arguments = worker.connection.recv()
                except (EOFError, OSError):  # also where it dies while its base's file is on the way
                    name, arguments = "lost", ()
                gone = self._gone_with_its_base(party, worker, patient=name in ("lost", "raised"))
                if gone is not None or name == "lost":
                    self._lost(party, gone or worker)
                else:
                    self._serve(party, worker, name, arguments)

    def stop(self) -> None:
        for party in self._parties:
            # The first last: on a GPU the others have its memory open.
            for worker in reversed(party.workers):
                worker.stop()
            party.forget_base()

    def _whose(self, connection: Any) -> tuple[_Party, _Worker | None]:
        found = ((p, w) for p in self._parties for w in p.workers if w.connection is connection)
        return next(found, (self._parties[0], None))

    def _gone_with_its_base(self, party: _Party, worker: _Worker, patient: bool) -> _Worker | None:
        """The one whose base a worker has open, where it is gone: nothing that the worker says then is to be believed.
        One that fails may be the sooner to be seen (`patient`)."""
        if worker.borrows:
            for one in party.workers:
                if one.handed:
                    one.process.join(_LAST_BREATH if patient else 0)
                    return None if one.process.is_alive() else one
        return None

    def _fill(self, party: _Party) -> None:
        for _ in range(party.missing):
            hands = not party.open and party.place.sharing > 1
            party.workers.append(_Worker(self._task, self._space, party.place, party.base, hands))

    def _serve(self, party: _Party, worker: _Worker, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "raised":
            raise arguments[0]
        if name == "end":
            self._ended(party, worker)
            return
        answer = None
        if name == "hand":
            party.base, worker.handed = arguments[0], True
        elif name == "keep":
            self._kept_apart(party, worker, *arguments)
        elif name == "next":
            answer = worker.job = self._deaths.next() or self._referee.next()
        else:
            answer = getattr(self._referee, name)(*arguments)
        if name == "ready":
            self._ready(party, worker, arguments[-1])
        elif name == "record":
            worker.job = None
        with suppress(BrokenPipeError, ConnectionResetError):  # it has ended meanwhile, and is found so
            worker.connection.send(answer)

    def _ready(self, party: _Party, worker: _Worker, found: Footprint | None) -> None:
        worker.ready = True
        if not party.open:
            party.open, party.found = True, found
            if party.place.sharing > 1:
                check_room(party.place, found, party.base)
            for other in self._parties:
                self._fill(other)

    def _kept_apart(self, party: _Party, worker: _Worker, reason: str) -> None:
        """A base cannot be handed over; those who have it open keep it."""
        worker.borrows = False
        if party.open and party.base is None:
            return  # another has said so before
        logger.warning("pronghorn: every worker loads a base of its own: %s", reason)
        party.forget_base()
        if party.open:
            check_room(party.place, party.found, None)

    def _ended(self, party: _Party, worker: _Worker) -> None:
        """Nothing is left to do: neither for those that have yet to begin."""
        party.wanted -= 1
        worker.resting = worker.handed
        if not worker.resting:
            party.workers.remove(worker)
            worker.dismiss()
        for other in self._parties:
            for one in [one for one in other.workers if not one.ready]:
                other.workers.remove(one)
                other.wanted -= 1
                one.stop()
            if all(one.resting for one in other.workers):
                for one in other.workers:
                    one.dismiss()
                other.workers.clear()

    def _lost(self, party: _Party, worker: _Worker) -> None:
        """A process is gone, and with it the base that others have open."""
        party.workers.remove(worker)
        worker.stop()
        if worker.borrows and not worker.ready:
            code = worker.process.exitcode
            self._kept_apart(
                party, worker, f"a process that opened the first one's ended with exit code {code}"
            )
        else:
            self._deaths.mourn(worker, self._referee)
        if worker.handed:
            for other in [one for one in party.workers if one.borrows]:
                party.workers.remove(other)
                other.stop()
                self._deaths.interrupted(other.job)
            party.forget_base()
            party.open = bool(party.workers)
        self._fill(party)


class Deaths:
    """Trials whose processes died: who is tried once more, and who has failed."""

    def __init__(self) -> None:
        self._again: list[Job] = []
        self._tried: set[int] = set()

    def next(self) -> Job | None:
        """A trial to be run once more."""
        return self._again.pop() if self._again else None

    def interrupted(self, job: Job | None) -> None:
        """A trial was ended with a process that was not its own, which says nothing against it."""
        if job is not None:
            logger.warning("pronghorn: trial %d is run once more: the process with its base is gone", job[0])
            self._again.append(job)

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


def check_room(place: Place, found: Footprint | None, base: SharedBase | None) -> None:
    """Whether the workers of a place fit, by what the largest trial is predicted to take at least; says so.

    Args:
        base: the one they have in common; None where each has its own.

    Raises:
        SearchInvalid: they do not.
    """
    where = "the host's memory" if place.gpu is None else "one GPU"
    common = "" if base is None else f" and a base of {base.size / GIB:.2f} GiB"
    if found is None:
        logger.warning(
            "pronghorn: %d workers share %s%s; what they take cannot be predicted for this model",
            place.sharing, where, common,
        )  # fmt: skip
        return
    shared = 0 if base is None else base.size
    each = max(found.needed - shared, 1)
    besides = "" if base is None else "besides the base "
    if shared + place.sharing * each > found.available:
        most = max((found.available - shared) // each, 1)
        fitting = [
            rows
            for rows, needed in found.by_batch.items()
            if shared + place.sharing * max(needed - shared, 1) <= found.available
        ]
        instead = f"search micro-batches up to {max(fitting)}" if fitting else "smaller micro-batches"
        raise SearchInvalid(
            f"{place.sharing} workers share {where} of {found.available / GIB:.2f} GiB{common}, and the largest trial "
            f"is predicted to take {besides}{each / GIB:.2f} GiB at least",
            fix=f"{most} there at most, or {instead}",
        )
    logger.warning(
        "pronghorn: %d workers share %s of %.2f GiB%s: %s%.2f GiB at least are predicted for the largest trial",
        place.sharing, where, found.available / GIB, common, besides, each / GIB,
    )  # fmt: skip
