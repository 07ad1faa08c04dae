"""The thread that runs the engine, and how the event loop talks to it.

The engine belongs to its thread alone. The event loop puts orders into a queue (begin these requests, cancel that one)
and gets back what every step of the engine gave, in one call a step.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pronghorn.errors import PronghornError, RequestTooLong
from pronghorn.inference.requests import Event, Request
from pronghorn.inference.server.model import ServedModel
from pronghorn.inference.server.problems import CallProblem, wrong_field

log = logging.getLogger("pronghorn")

State = Literal["starting", "ready", "stopping", "failed"]
#: Failures of the engine's step, one after another, after which the server gives up.
MOST_FAILURES = 2
RETRY_AFTER = 1


class EngineLike(Protocol):
    """What the worker needs of an engine; see `pronghorn.inference.engine.Engine`."""

    def submit(self, request: Request) -> int: ...
    def cancel(self, request_id: int) -> None: ...
    def step(self) -> list[Event]: ...
    @property
    def has_work(self) -> bool: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def free_blocks(self) -> int: ...
    @property
    def total_blocks(self) -> int: ...


Answered = Event | Exception


@dataclass(eq=False)
class Job:
    """Requests of one call, run side by side; `inbox` gets (which of them, what it gave).

    None for what it gave says that the engine took the request.
    """

    requests: tuple[Request, ...]
    inbox: asyncio.Queue[tuple[int, Answered | None]] = field(default_factory=asyncio.Queue)
    unfinished: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Counts:
    """Where the engine stands, as of its last step."""

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    tokens: int = 0
    steps: int = 0


class Worker:
    """Runs an engine in a thread of its own.

    Args:
        load: makes the engine and says what it serves, in the thread; whatever it raises ends the worker.
        most_open: requests that may run and wait at a time; more are refused.
        on_end: called in the thread when it failed.
    """

    def __init__(
        self,
        load: Callable[[], tuple[EngineLike, ServedModel]],
        *,
        most_open: int,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._load = load
        self._most_open = most_open
        self._on_end = on_end
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="pronghorn-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: EngineLike
        self._model: ServedModel | None = None
        self._owners: dict[int, tuple[Job, int]] = {}
        self._outgoing: list[tuple[Job, int, Answered | None]] = []
        self._open: set[Job] = set()
        self._moving = threading.Lock()
        self.state: State = "starting"
        self.error: Exception | None = None
        self.counts = Counts()
        self._loaded = threading.Event()

    # The event loop's side.

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    def wait_until_loaded(self) -> ServedModel | None:
        """Waits, in any thread; what is served then, None when loading failed."""
        self._loaded.wait()
        return self._model

    def refuse_new(self) -> None:
        """From now on only what was begun is finished."""
        self._move({"starting", "ready"}, "stopping")

    def _move(self, before: set[State], after: State) -> None:
        """Change the state if it is one of `before`; both threads do."""
        with self._moving:
            if self.state in before:
                self.state = after

    def stop(self) -> None:
        """End the thread; returns when it has ended, or at once where it is still loading. What runs is cancelled."""
        self.refuse_new()
        self._orders.put(None)
        if self._loaded.is_set():
            self._thread.join()

    @property
    def open_requests(self) -> int:
        return sum(len(job.unfinished) for job in self._open)

    def submit(self, requests: Sequence[Request]) -> Job:
        """Begin requests.

        Raises:
            CallProblem: 503 while the server starts or stops, 429 when too many are open, 400 when so many never fit.
        """
        self.check_ready()
        if len(requests) > self._most_open:
            raise wrong_field("n", f"'n' asks for {len(requests)} answers, and {self._most_open} may be open")
        if self.open_requests + len(requests) > self._most_open:
            raise CallProblem(
                429,
                f"the queue is full: {self.open_requests} answers run or wait, and {self._most_open} may",
                code="queue_full",
                retry_after=RETRY_AFTER,
            )
        job = Job(tuple(requests), unfinished=set(range(len(requests))))
        self._open.add(job)
        self._orders.put(lambda: self._begin(job))
        return job

    def check_ready(self) -> ServedModel:
        """What is served.

        Raises:
            CallProblem: 503 unless requests can be answered.
        """
        if self.state != "ready" or self._model is None:
            texts = {"starting": "the model is being loaded", "stopping": "the server is stopping"}
            text = texts.get(self.state, "the engine has failed")
            raise CallProblem(503, text, code=f"server_{self.state}", retry_after=5)
        return self._model

    async def events(self, job: Job) -> AsyncIterator[list[tuple[int, Event]]]:
        """(which request, its event), all that have come since the last time, until all requests have finished.

        Raises:
            CallProblem: the engine failed, or the server stops.
        """
        while job.unfinished:
            arrived = [await job.inbox.get()]
            while not job.inbox.empty():
                arrived.append(job.inbox.get_nowait())
            failure = next((answered for _, answered in arrived if isinstance(answered, Exception)), None)
            events = [(index, answered) for index, answered in arrived if isinstance(answered, Event)]
            for index, event in events:
                if event.finish_reason is not None:
                    self._finished(job, index)
            yield events
            if failure is not None:
                raise failure

    async def taken(self, job: Job) -> None:
        """Returns when the engine has taken all requests.

        Raises:
            Exception: why it refused one.
        """
        for _ in job.requests:
            # The engine takes all of a job's requests before its next step: these come before any event.
            _, answered = await job.inbox.get()
            if isinstance(answered, Exception):
                raise answered

    def cancel(self, job: Job, index: int) -> None:
        """One request's answer is not wanted any more."""
        if index in job.unfinished:
            self._finished(job, index)
            self._orders.put(lambda: self._drop(job, index))

    def close(self, job: Job) -> None:
        """Cancel what is left of a job. Every job must be closed."""
        for index in sorted(job.unfinished):
            self.cancel(job, index)

    def fail_open(self, error: Exception) -> None:
        """Every answer that is being written ends with this error."""
        for job in list(self._open):
            for index in sorted(job.unfinished):
                job.inbox.put_nowait((index, error))

    def _finished(self, job: Job, index: int) -> None:
        job.unfinished.discard(index)
        if not job.unfinished:
            self._open.discard(job)

    # The thread's side.

    def _run(self) -> None:
        try:
            self._engine, self._model = self._load()
            self._count(())
            self._move({"starting"}, "ready")
            self._loaded.set()
            self._serve()
        except Exception as error:
            self.error = error
            self._move({"starting", "ready", "stopping"}, "failed")
            self._loaded.set()
            self._fail_all()
            self._on_end()
            while (order := self._orders.get()) is not None:
                order()
                self._send()

    def _serve(self) -> None:
        failures = 0
        while self._take_orders():
            try:
                events = self._engine.step()
                failures = 0
            except Exception:
                log.exception("the engine failed")
                failures += 1
                if failures == MOST_FAILURES:
                    raise
                self._fail_all()
                continue
            self._count(events)
            for event in events:
                self._tell(event)
            self._send()

    def _take_orders(self) -> bool:
        """Carry out what was ordered, waiting when there is nothing else to do; False when told to end."""
        while True:
            try:
                order = self._orders.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()
            self._count(())
            self._send()

    def _begin(self, job: Job) -> None:
        for index, request in enumerate(job.requests):
            try:
                if self.error is not None:
                    raise _engine_failed()
                self._owners[self._engine.submit(request)] = (job, index)
            except Exception as error:
                self._outgoing.append((job, index, error))
                return
            self._outgoing.append((job, index, None))

    def _drop(self, job: Job, index: int) -> None:
        for request_id, owner in self._owners.items():
            if owner == (job, index):
                del self._owners[request_id]
                self._engine.cancel(request_id)
                return

    def _tell(self, event: Event) -> None:
        owner = self._owners.get(event.request_id)
        if owner is None:  # cancelled meanwhile
            return
        if event.finish_reason is not None:
            del self._owners[event.request_id]
        self._outgoing.append((*owner, event))

    def _fail_all(self) -> None:
        """Every request that runs ends with an error, and leaves the engine if that still can."""
        for request_id, owner in self._owners.items():
            self._outgoing.append((*owner, _engine_failed()))
            try:
                self._engine.cancel(request_id)
            except Exception:
                log.exception("a request could not be cancelled")
        self._owners.clear()
        self._send()

    def _count(self, events: Sequence[Event]) -> None:
        engine, last = self._engine, self.counts
        self.counts = Counts(
            running=engine.running,
            waiting=engine.waiting,
            free_blocks=engine.free_blocks,
            total_blocks=engine.total_blocks,
            tokens=last.tokens + sum(len(event.tokens) for event in events),
            steps=last.steps + bool(events),
        )

    def _send(self) -> None:
        """Hand what is outgoing to the event loop, all of it in one call."""
        outgoing, self._outgoing = self._outgoing, []
        if not outgoing or self._loop is None:
            return

        def deliver() -> None:
            for job, index, answered in outgoing:
                job.inbox.put_nowait((index, answered))

        try:
            self._loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # the loop has been closed: nobody listens any more
            log.debug("an answer came after the end")


def _engine_failed() -> CallProblem:
    """A new one each time: an exception that is raised keeps the frames that it went through."""
    return CallProblem(500, "the engine failed; the server's log says more", code="engine_failed")


def refusal(error: Exception) -> CallProblem:
    """An error in the course of an answer, as it is told to the client."""
    if isinstance(error, CallProblem):
        return error
    if isinstance(error, PronghornError):  # the engine does not take the request
        fix = f". {error.fix}" if error.fix else ""
        code = "context_length_exceeded" if isinstance(error, RequestTooLong) else error.code
        return CallProblem(400, f"{error.message}{fix}", code=code)
    log.error("an answer failed", exc_info=error)
    return CallProblem(500, "unexpected; the server's log says more")
