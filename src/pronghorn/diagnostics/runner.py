"""Runs checks in processes of their own, several side by side where there are cores for it, and collects results."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pronghorn.diagnostics.checks import LIMIT_SECONDS, Check, Result, by_group, perform
from pronghorn.diagnostics.worker import REGISTRY, read_registry

Report = Callable[[Result], None]
Events = queue.Queue[dict[str, Any] | None]

#: Groups that share a process where there are cores for several: what compiles longest runs beside the rest.
_LANES = (("kernels",), ("versions", "training", "machine"), ("attention",), ("quantised",))
_STARTING = "starting"
_WORKER = (
    "import json, sys; sys.path[:0] = json.loads(sys.argv[1]); "
    "from pronghorn.diagnostics.worker import main; sys.exit(main(sys.argv[2:]))"
)


def run_here(checks: Sequence[Check], report: Report = lambda result: None) -> list[Result]:
    """All checks one after the other in this process: no protection against a crash."""
    results = []
    for check in checks:
        results.append(perform(check))
        report(results[-1])
    return results


def run_apart(
    registry: str = REGISTRY,
    report: Report = lambda result: None,
    *,
    limit: float = LIMIT_SECONDS,
    processes: int | None = None,
) -> list[Result]:
    """All checks of a registry in worker processes; results in the registry's order.

    A check whose process dies, or that takes longer than `limit`, has failed; the checks after it run in a new process.

    Args:
        report: called with every result as it comes.
        processes: how many side by side; None: as many as have two cores each, up to one for each kind of work.
    """
    checks = read_registry(registry)
    groups = _lanes(checks, processes or max(1, usable_cores() // 2))
    collected = _Collected(report)
    lanes = [_Lane(group, registry, limit, collected) for group in groups]
    threads = [threading.Thread(target=lane.run, daemon=True) for lane in lanes]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:  # interrupted, or whoever reads the results has gone
        collected.stopped = True
        for lane in lanes:
            lane.end()
    if collected.refusal is not None:
        raise collected.refusal
    return [collected.results[check.name] for check in checks]


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _lanes(checks: Sequence[Check], processes: int) -> list[list[Check]]:
    groups = by_group(checks)
    known = [[c for name in names for c in groups.pop(name, [])] for names in _LANES]
    lanes = [lane for lane in [*known, *groups.values()] if lane]
    while len(lanes) > max(processes, 1):
        last = lanes.pop()
        lanes[-1].extend(last)
    if len(lanes) == 1:
        lanes = [list(checks)]
    return lanes


@dataclass
class _Collected:
    """Results of all processes, handed on one at a time."""

    report: Report
    results: dict[str, Result] = field(default_factory=dict)
    refusal: Exception | None = None
    stopped: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, result: Result) -> None:
        with self._lock:
            self.results[result.name] = result
            if self.stopped:
                return
            try:
                self.report(result)
            except Exception as error:
                self.refusal, self.stopped = error, True


@dataclass
class _Lane:
    """One process at a time, for checks one after the other."""

    checks: list[Check]
    registry: str
    limit: float
    collected: _Collected
    _process: subprocess.Popen[str] | None = None
    _events: Events = field(default_factory=queue.Queue)
    _last_words: list[str] = field(default_factory=list)

    def run(self) -> None:
        left = list(self.checks)
        while left and not self.collected.stopped:
            before = len(left)
            self._run_process(left)
            if (
                len(left) == before
            ):  # it cannot even start: the first one stands for the reason, the next ones try
                self._fail(left.pop(0), "the process for it did not start", 0.0)

    def end(self) -> None:
        """Stop the process that runs, if one does."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def _run_process(self, left: list[Check]) -> None:
        """One worker from its start to its end; checks that are done with leave `left`."""
        self._events, self._last_words = queue.Queue(), []
        process = self._process = self._start(left)
        current, began = _STARTING, time.monotonic()
        try:
            while not self.collected.stopped:
                try:
                    event = self._events.get(timeout=max(0.0, began + self.limit - time.monotonic()))
                except queue.Empty:
                    self._fail(left.pop(0), f"not done after {self.limit:.0f} s, and stopped", self.limit)
                    return
                if event is None:
                    break
                if "began" in event:
                    current, began = event["began"], time.monotonic()
                elif "result" in event:
                    left.pop(0)
                    self.collected.take(Result(**event["result"]))
                    current = _STARTING
                elif event.get("lost"):
                    return
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        if self.collected.stopped:
            return
        if left and current == left[0].name:
            reason = f"the process {_ending(process.returncode)} in the middle of it{self._words()}"
            self._fail(left.pop(0), reason, time.monotonic() - began)
        elif left:
            reason = f"the process {_ending(process.returncode)} before it began{self._words()}"
            self._fail(left.pop(0), reason, time.monotonic() - began)

    def _start(self, left: list[Check]) -> subprocess.Popen[str]:
        # The worker is to find what this process found, also where the package is run from its sources.
        source = str(Path(__file__).resolve().parents[2])
        path = json.dumps([source, *[entry for entry in sys.path if entry]])
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, path, self.registry],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        listening = (process.stdout, process.stderr, self._events, self._last_words)
        threading.Thread(target=_listen, args=listening, daemon=True).start()
        with suppress(BrokenPipeError):  # a process that is dead already tells it by its output's end
            process.stdin.write("\n".join(check.name for check in left))
            process.stdin.close()
        return process

    def _words(self) -> str:
        said = [line.strip() for line in self._last_words if line.strip()]
        return f": {said[-1][:200]}" if said else ""

    def _fail(self, check: Check, reason: str, seconds: float) -> None:
        fix = "run it again; if it stays so, report it with the output of `pronghorn doctor --json`"
        self.collected.take(Result(check.group, check.name, "FAIL", reason, round(seconds, 3), fix))


def _listen(stdout: IO[str], stderr: IO[str], events: Events, last_words: list[str]) -> None:
    """Events of one process as they come, and None at its end."""
    words = threading.Thread(target=_keep_last_words, args=(stderr, last_words), daemon=True)
    words.start()
    for line in stdout:
        events.put(json.loads(line))
    words.join(timeout=5)
    events.put(None)


def _keep_last_words(stderr: IO[str], last_words: list[str]) -> None:
    for line in stderr:
        last_words.append(line)
        del last_words[:-20]


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
