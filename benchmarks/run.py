"""Run workloads through sides, each in its own process, and print one table a workload.

    python -m benchmarks.run --workload llama8b-lora --sides hf,unsloth,pronghorn-none --out results.csv

A side that fails or takes too long costs one line. Ratios are against Unsloth's default in the same run. They are
withheld where the first loss differs from the stock model's, and from pronghorn where `benchmarks.verify` (or, in FP8,
`benchmarks.gates`) was red or not run for the present sources on this hardware.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import parity
from benchmarks.models import INDEX
from benchmarks.registry import (
    DEFAULT_SIDES,
    SIDES,
    WORKLOADS,
    Side,
    Workload,
    find_side,
    find_workload,
    split,
)
from benchmarks.side import RESULT_PREFIX
from benchmarks.table import append_csv, rate, report, whole_report

REPOSITORY = Path(__file__).resolve().parent.parent
#: what has to be importable for a library's sides
PACKAGES = {"hf": "trl", "liger": "liger_kernel", "unsloth": "unsloth", "pronghorn": "trl"}
#: how a line with the ceilings of `benchmarks.ceiling` begins
CEILING_PREFIX = "BENCHMARK_CEILING "
#: bytes of free space asked of shared memory: 8 billion weights of two bytes, and some room
LARGEST_CHECKPOINT = 24 << 30


def environment(work: Path, library: str) -> dict[str, str]:
    """The environment of a side's process: absolute import paths, and compile caches that start empty per library."""
    given = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    paths = dict.fromkeys([*given, str(REPOSITORY / "src"), str(REPOSITORY)])
    # An installed package brings its modules compiled; the sources here are compiled by the first process that may
    # write, and by every one otherwise.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRITON_CACHE_DIR": str(work / f"cache-{library}" / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / f"cache-{library}" / "inductor"),
    }


@contextlib.contextmanager
def started_module(
    module: str, arguments: list[str], *, work: Path, library: str, log: Path, pass_fds: tuple[int, ...] = ()
) -> Iterator[subprocess.Popen]:
    """`python -m module` running in the work folder; ended, with all it started, at the end."""
    folder = work / f"cwd-{library}"
    folder.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        # Its own process group and a file instead of a pipe: compile workers it leaves behind cannot hold us up.
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=folder,
            env=environment(work, library),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=pass_fds,
        )
        try:
            with _left_by_sigterm():
                yield process
        finally:
            _end_group(process)


@contextlib.contextmanager
def _left_by_sigterm() -> Iterator[None]:
    """What asks this process to end (`timeout`) leaves the block as an exception, so that nothing of a side stays on
    the GPU; in the main thread, where signals arrive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_module(
    module: str,
    arguments: list[str],
    *,
    work: Path,
    library: str,
    timeout: float,
    log: Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> tuple[int, str]:
    """Run `python -m module` in the work folder; its exit status (124: too long) and its output.

    Args:
        tell: is called with each line of the output as it comes.
    """
    log = log or work / f"cwd-{library}" / f"{module}.log"
    with started_module(module, arguments, work=work, library=library, log=log) as process:
        if tell is None:
            try:
                status = process.wait(timeout)
            except subprocess.TimeoutExpired:
                status = 124
        else:
            status = _wait_and_tell(process, timeout, log, tell)
    return status, log.read_text(errors="replace")


def _wait_and_tell(process: subprocess.Popen, timeout: float, log: Path, tell: Callable[[str], None]) -> int:
    """The exit status (124: too long), each whole line of the log told meanwhile."""
    until, rest = time.monotonic() + timeout, ""
    with log.open(errors="replace") as file:
        while True:
            status = process.poll()
            *lines, rest = (rest + file.read()).split("\n")
            for line in lines:
                tell(line)
            if status is not None:
                if rest:
                    tell(rest)
                return status
            if time.monotonic() > until:
                return 124
            time.sleep(0.1)


def results_in(output: str) -> list[dict[str, Any]]:
    """What a process printed as results, in order."""
    lines = (line for line in output.splitlines() if line.startswith(RESULT_PREFIX))
    return [json.loads(line[len(RESULT_PREFIX) :]) for line in lines]


def _end_group(process: subprocess.Popen) -> None:
    """End a process and what it started."""
    with contextlib.suppress(ProcessLookupError):  # the whole group is gone already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def failure_reason(status: int, output: str, timeout: float) -> str:
    """The exception of the last traceback, else the last line."""
    if status == 124:
        return f"stopped after {timeout:.0f} s"
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("Traceback")]
    after = lines[starts[-1] + 1 :] if starts else []
    raised = [line for line in after if not line.startswith(" ")]  # frames are indented, the exception is not
    return f"exit status {status}: {(raised[:1] or lines[-1:] or ['no output'])[0].strip()[:300]}"


def side_arguments(
    workload: Workload, side: Side, options: argparse.Namespace, checkpoint: Path, started: float
) -> list[str]:
    """The command line of a side's process."""
    arguments = ["--workload", workload.name, "--side", side.name, "--checkpoint", str(checkpoint)]
    arguments += ["--started", str(started)]
    for name in ("steps", "warmup"):
        if getattr(options, name):
            arguments += [f"--{name}", str(getattr(options, name))]
    return arguments


def log_file(workload: Workload, side: Side, options: argparse.Namespace, work: Path) -> Path:
    return (options.logs or work / "logs") / f"{workload.name}-{side.name}.log".replace("@", "-")


def run_side(
    workload: Workload, side: Side, options: argparse.Namespace, work: Path, checkpoint: Path
) -> dict[str, Any]:
    """One side's result row, or a row with `error`."""
    started = time.time()
    status, output = run_module(
        "benchmarks.side",
        side_arguments(workload, side, options, checkpoint, started),
        work=work,
        library=side.library,
        timeout=options.timeout,
        log=log_file(workload, side, options, work),
    )
    return result_row(workload, side, options, status, output, started)


def result_row(
    workload: Workload, side: Side, options: argparse.Namespace, status: int, output: str, started: float
) -> dict[str, Any]:
    """What a side's process printed, as a row; without a result, the error."""
    found = results_in(output)
    if found:
        result = found[-1]
    else:
        result = {"workload": workload.name, "side": side.name, "label": side.label(workload)}
        result["error"] = failure_reason(status, output, options.timeout)
        if options.show_errors:
            print(f"--- {side.name}, end of its output\n{output[-options.show_errors :]}\n---", flush=True)
    result |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    result |= {"source": parity.source_hash(), "took_s": time.time() - started}
    return result


def run_in_turn(
    workload: Workload, sides: list[Side], options: argparse.Namespace, work: Path, checkpoint: Path
) -> list[dict[str, Any]]:
    """All sides at once, one training step of one side at a time: what else the machine does hits them alike."""
    with contextlib.ExitStack() as stack:
        running = [_start_in_turn(stack, workload, side, options, work, checkpoint) for side in sides]
        waiting = list(running)
        while waiting and time.time() < options.deadline:
            # A process whose pipe closes has ended, well or not.
            waiting = [one for one in waiting if _one_turn(one, options)]
        results = []
        for one in running:
            os.close(one.go)
            status = one.process.wait(60) if one not in waiting else 124
            output = one.log.read_text(errors="replace")
            results.append(result_row(workload, one.side, options, status, output, one.started))
    return results


@dataclass
class _Running:
    """A side's process that waits for its turns: `ready` is read from, `go` written to."""

    side: Side
    process: subprocess.Popen
    log: Path
    ready: int
    go: int
    started: float
    waits: bool = False


def _start_in_turn(
    stack: contextlib.ExitStack,
    workload: Workload,
    side: Side,
    options: argparse.Namespace,
    work: Path,
    checkpoint: Path,
) -> _Running:
    """Start a side and let it load; return when it waits for its first step."""
    (ready, theirs_out), (theirs_in, go), started = os.pipe(), os.pipe(), time.time()
    arguments = side_arguments(workload, side, options, checkpoint, started)
    arguments += ["--turns", f"{theirs_in},{theirs_out}"]
    log = log_file(workload, side, options, work)
    pipes = (theirs_in, theirs_out)
    process = stack.enter_context(
        started_module("benchmarks.side", arguments, work=work, library=side.library, log=log, pass_fds=pipes)
    )
    for end in pipes:
        os.close(end)
    running = _Running(side, process, log, ready, go, started)
    running.waits = _answered(running, options)
    return running


def _answered(running: _Running, options: argparse.Namespace) -> bool:
    """Whether a side said that it waits for its turn, before its time was over or it ended."""
    found, _, _ = select.select([running.ready], [], [], max(1.0, options.timeout))
    return bool(found) and os.read(running.ready, 1) == b"r"


def _one_turn(running: _Running, options: argparse.Namespace) -> bool:
    """Let a side take a step; False when it was the last."""
    if not running.waits:
        return False
    os.write(running.go, b"g")
    running.waits = _answered(running, options)
    return running.waits


def commit() -> str:
    """The short commit of the working tree, "+" when it has changes; empty without git."""
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head.stdout.strip() if head.returncode == 0 else ""


def checkpoint_folder(options: argparse.Namespace, work: Path, model: str) -> Path:
    """A finished checkpoint of the model, written in its own process.

    Raises:
        SystemExit: when writing it fails.
    """
    folder = options.checkpoints / model
    if (folder / INDEX).exists():
        return folder
    status, output = run_module(
        "benchmarks.models", [model, str(folder)], work=work, library="hf", timeout=max(options.timeout, 300)
    )
    if status:
        raise SystemExit(
            f"checkpoint of {model}: {failure_reason(status, output, options.timeout)}\n{output[-2000:]}"
        )
    return folder


def run_workload(
    workload: Workload, sides: list[Side], options: argparse.Namespace, work: Path
) -> list[dict[str, Any]]:
    """All sides of one workload, `rounds` times one after the other."""
    checkpoint = checkpoint_folder(options, work, workload.model)
    results: list[dict[str, Any]] = []
    if options.ceiling:
        results += ceiling_rows(workload, options, work)
    if options.in_turn:
        results += run_in_turn(workload, sides, options, work, checkpoint)
    else:
        for _ in range(options.rounds):
            results += run_round(workload, sides, options, work, checkpoint)
    rate(results, options.parity)
    return results


def run_round(
    workload: Workload, sides: list[Side], options: argparse.Namespace, work: Path, checkpoint: Path
) -> list[dict[str, Any]]:
    """All sides of one workload, one after the other."""
    results = []
    for side in sides:
        left = options.deadline - time.time()
        if left < 20:
            row: dict[str, Any] = {
                "workload": workload.name,
                "side": side.name,
                "label": side.label(workload),
            }
            results.append({**row, "error": "not run: the time budget is spent"})
            continue
        options.timeout = min(options.side_timeout, left)
        result = run_side(workload, side, options, work, checkpoint)
        speed = f"{result['tokens_per_s']:,.0f} tok/s" if "error" not in result else result["error"]
        print(f"  {workload.name} {side.name}: {speed} ({result['took_s']:.0f} s)", flush=True)
        results.append(result)
    return results


def ceiling_rows(workload: Workload, options: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """What the matrix and attention rates of this machine, measured now, allow; see `benchmarks.ceiling`."""
    status, output = run_module(
        "benchmarks.ceiling",
        ["--workload", workload.name],
        work=work,
        library="pronghorn",
        timeout=min(options.side_timeout, max(1.0, options.deadline - time.time())),
    )
    print(output if status == 0 else failure_reason(status, output, options.side_timeout), flush=True)
    lines = [line[len(CEILING_PREFIX) :] for line in output.splitlines() if line.startswith(CEILING_PREFIX)]
    return [
        {
            "workload": workload.name, "side": f"ceiling, {name}", "label": label, "tokens_per_s": speed,
            "ceiling": True, "date": datetime.now(UTC).isoformat(timespec="seconds"), "source": parity.source_hash(),
        }
        for line in lines for name, label, speed in json.loads(line)
    ]  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument(
        "--workload", "--workloads", help=f"comma-separated, or all; known: {', '.join(WORKLOADS)}"
    )
    parser.add_argument("--sides", help=f"comma-separated, or all; known: {', '.join(SIDES)}")
    parser.add_argument("--steps", type=int, help="timed steps (default: the workload's)")
    parser.add_argument("--warmup", type=int, help="steps before (default: the workload's)")
    parser.add_argument("--rounds", type=int, default=1, help="repeat all sides this often, interleaved")
    parser.add_argument(
        "--in-turn",
        action="store_true",
        help="all sides loaded at once, a step of each in turn (for a CPU that others use, too)",
    )
    parser.add_argument("--ceiling", action="store_true", help="measure what the machine's rates allow, too")
    parser.add_argument(
        "--parity", type=Path, default=parity.DEFAULT_FILE, help="what the parity checks left (JSON)"
    )
    parser.add_argument("--out", type=Path, help="CSV file to append to")
    parser.add_argument("--json", action="store_true", help="print results as JSON lines too")
    parser.add_argument("--logs", type=Path, help="folder for each side's whole output")
    parser.add_argument(
        "--show-errors", type=int, default=0, metavar="N", help="end of a failed side's output"
    )
    parser.add_argument(
        "--checkpoints", type=Path, help="kept between runs (default: in /dev/shm or the temp folder)"
    )
    parser.add_argument("--side-timeout", type=float, default=240.0, help="seconds for one side")
    parser.add_argument(
        "--budget", type=float, default=86400.0, help="seconds for everything; what is left is not run"
    )
    options = parser.parse_args(argv)
    options.deadline = time.time() + options.budget
    options.timeout = options.side_timeout
    options.checkpoints = options.checkpoints or roomy_folder() / "benchmark-checkpoints"
    return options


def roomy_folder() -> Path:
    """Shared memory where it holds the largest checkpoint, else the folder for temporary files."""
    shared = Path("/dev/shm")
    if os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > LARGEST_CHECKPOINT:
        return shared
    return Path(tempfile.gettempdir())


def installed(sides: list[Side]) -> list[Side]:
    """The sides whose library is on this machine; the others are named."""
    missing = [side.name for side in sides if find_spec(PACKAGES[side.library]) is None]
    if missing:
        print(f"left out, not installed: {', '.join(sorted(missing))}", flush=True)
    return [side for side in sides if side.name not in missing]


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    workloads = [find_workload(name) for name in split(options.workload, WORKLOADS, ("llama8b-lora",))]
    sides = [find_side(name) for name in split(options.sides, SIDES, DEFAULT_SIDES)]
    if options.sides is None:
        sides = installed(sides)
    options.checkpoints = options.checkpoints.absolute()
    options.logs = options.logs.absolute() if options.logs else None
    failed = 0
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        groups = []
        for workload in workloads:
            results = run_workload(workload, sides, options, Path(folder))
            failed += sum("error" in result for result in results)
            groups.append((workload, results))
            print(f"\n{report(workload, results)}\n", flush=True)
            if options.json:
                print("\n".join(json.dumps(result) for result in results), flush=True)
            if options.out:
                append_csv(options.out, results)
        if len(groups) > 1:
            print(f"everything\n{whole_report(groups)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
