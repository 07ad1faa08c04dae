"""A worker's process: its part of the machine, its base, and its side of the pipe to the process that searches."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from pronghorn.errors import PronghornError, SearchFailed
from pronghorn.experiments.search.bench import Task, work
from pronghorn.experiments.search.footprint import Footprint
from pronghorn.experiments.search.sharing import SharedBase, share
from pronghorn.experiments.search.space import Settings, Space
from pronghorn.experiments.search.trial import Trial


@dataclass(frozen=True)
class Place:
    """Where a worker runs.

    Args:
        gpu: the GPU as CUDA_VISIBLE_DEVICES names it, empty where there is but one; None without any.
        sharing: workers there.
    """

    gpu: str | None
    sharing: int

    def settle(self) -> None:
        """In the worker, before it touches a GPU."""
        if self.gpu is None:
            torch.set_num_threads(max(torch.get_num_threads() // self.sharing, 1))
        elif self.gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu

    def limit_memory(self, shared: int = 0, *, here: bool = True) -> None:
        """Leave the others of a GPU their parts: of what a base of `shared` bytes leaves each worker has an equal one,
        and the one that loaded it (`here`) the base, too: torch counts what a process asked for, not what it opened."""
        if self.gpu is None or self.sharing == 1:
            return
        total = torch.cuda.mem_get_info()[1]
        part = (total - shared) / self.sharing + here * shared
        torch.cuda.set_per_process_memory_fraction(part / total)


class Remote:
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

    def hand(self, base: SharedBase) -> None:
        """Others can have this process's base."""
        self._ask("hand", base)

    def keep(self, reason: str) -> None:
        """This process's base is its own, and nobody else's."""
        self._ask("keep", reason)


class Loader:
    """A worker's base: loaded, and handed to the others of its place, or opened where another has loaded it.

    Args:
        given: the other's. hands: there are others to hand it to.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Any, Any]],
        place: Place,
        remote: Remote,
        given: SharedBase | None,
        hands: bool,
    ) -> None:
        self._load, self._place, self._remote = load, place, remote
        self._given, self._hands = given, hands
        #: what has to stay while others have the base open
        self.held: list[Any] = []

    def __call__(self) -> tuple[Any, Any]:
        base = self._opened()
        if base is not None:
            return base
        base, shared = self._load(), 0
        if self._hands:
            try:
                handed, self.held = share(*base)
            except Exception as error:  # of whatever the model is made of, and of CUDA
                self._remote.keep(_said("it cannot be handed over", error))
            else:
                self._remote.hand(handed)
                handed.close()
                shared = handed.size
        self._place.limit_memory(shared)
        return base

    def _opened(self) -> tuple[Any, Any] | None:
        if self._given is None:
            return None
        try:
            base = self._given.open()
        except Exception as error:
            self._remote.keep(_said("it cannot be opened in another process", error))
            return None
        finally:
            self._given.close()
        self._place.limit_memory(self._given.size, here=False)
        return base


def _said(what: str, error: Exception) -> str:
    return f"{what} ({type(error).__name__}: {str(error).partition(chr(10))[0]})"


def run_worker(
    connection: Connection,
    task: Task,
    space: Space,
    place: Place,
    given: SharedBase | None,
    hands: bool,
) -> None:
    """A worker's process. An interrupt is for the process that searches, which ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    remote = Remote(connection)
    loader = Loader(task.load, place, remote, given, hands)
    try:
        place.settle()
        # They were made where all GPUs were seen.
        task.settings._n_gpu = min(task.settings.n_gpu, 1)
        work(replace(task, load=loader), space, remote)
        # What was opened of another process's is let go of while that one is there to hear of it.
        gc.collect()
        connection.send(("end", ()))
        if loader.held:
            with suppress(EOFError):
                connection.recv()  # until the others have ended
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # whoever searches is gone
    except PronghornError as error:
        connection.send(("raised", (error,)))
    except Exception as error:
        failed = SearchFailed(
            f"a worker raised {type(error).__name__}: {error}", fix="try it with one worker"
        )
        connection.send(("raised", (failed,)))
