"""Run workloads through sides, each in its own process, and print one table a workload.

    python -m benchmarks.run --workload llama8b-lora --sides hf,unsloth,pronghorn-none --out results.csv

A side that fails or takes too long costs one line. Ratios are against Unsloth's default in the same run, and are
withheld where the first loss differs from the stock model's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.models import INDEX
from benchmarks.registry import DEFAULT_SIDES, SIDES, WORKLOADS, Side, Workload, pick
from benchmarks.side import RESULT_PREFIX
from benchmarks.table import append_csv, rate, report

REPOSITORY = Path(__file__).resolve().parent.parent
#: what has to be importable for a library's sides
PACKAGES = {"hf": "trl", "liger": "liger_kernel", "unsloth": "unsloth", "pronghorn": "trl"}
#: bytes of free space asked of shared memory: 8 billion weights of two bytes, and some room
LARGEST_CHECKPOINT = 24 << 30


def environment(work: Path, library: str) -> dict[str, str]:
    """The environment of a side's process: absolute import paths, and compile caches that start empty per library."""
    given = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    paths = dict.fromkeys([*given, str(REPOSITORY / "src"), str(REPOSITORY)])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRITON_CACHE_DIR": str(work / f"cache-{library}" / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / f"cache-{library}" / "inductor"),
    }


def run_module(
    module: str, arguments: list[str], *, work: Path, library: str, timeout: float, log: Path | None = None
) -> tuple[int, str]:
    """Run `python -m module` in the work folder; its exit status (124: too long) and its output."""
    folder = work / f"cwd-{library}"
    folder.mkdir(parents=True, exist_ok=True)
    log = log or folder / f"{module}.log"
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
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            _end_group(process)
    return status, log.read_text(errors="replace")


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


def run_side(
    workload: Workload, side: Side, options: argparse.Namespace, work: Path, checkpoint: Path
) -> dict[str, Any]:
    """One side's result row, or a row with `error`."""
    started = time.time()
    arguments = ["--workload", workload.name, "--side", side.name, "--checkpoint", str(checkpoint)]
    arguments += ["--started", str(started)]
    for name in ("steps", "warmup"):
        if getattr(options, name):
            arguments += [f"--{name}", str(getattr(options, name))]
    log = options.logs / f"{workload.name}-{side.name}.log" if options.logs else None
    status, output = run_module(
        "benchmarks.side", arguments, work=work, library=side.library, timeout=options.timeout, log=log
    )
    found = [line[len(RESULT_PREFIX) :] for line in output.splitlines() if line.startswith(RESULT_PREFIX)]
    if found:
        result = json.loads(found[-1])
    else:
        result = {"workload": workload.name, "side": side.name, "label": workload.label}
        result["error"] = failure_reason(status, output, options.timeout)
        if options.show_errors:
            print(f"--- {side.name}, end of its output\n{output[-options.show_errors :]}\n---", flush=True)
    result |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
    result["took_s"] = time.time() - started
    return result


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
    results = []
    for _ in range(options.rounds):
        for side in sides:
            left = options.deadline - time.time()
            if left < 20:
                row: dict[str, Any] = {"workload": workload.name, "side": side.name, "label": workload.label}
                results.append({**row, "error": "not run: the time budget is spent"})
                continue
            options.timeout = min(options.side_timeout, left)
            result = run_side(workload, side, options, work, checkpoint)
            speed = f"{result['tokens_per_s']:,.0f} tok/s" if "error" not in result else result["error"]
            print(f"  {workload.name} {side.name}: {speed} ({result['took_s']:.0f} s)", flush=True)
            results.append(result)
    rate(results)
    return results


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument(
        "--workload", "--workloads", help=f"comma-separated, or all; known: {', '.join(WORKLOADS)}"
    )
    parser.add_argument("--sides", help=f"comma-separated, or all; known: {', '.join(SIDES)}")
    parser.add_argument("--steps", type=int, help="timed steps (default: the workload's)")
    parser.add_argument("--warmup", type=int, help="steps before (default: the workload's)")
    parser.add_argument("--rounds", type=int, default=1, help="repeat all sides this often, interleaved")
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


def installed(names: tuple[str, ...]) -> tuple[str, ...]:
    """The sides whose library is on this machine; the others are named."""
    missing = {name for name in names if find_spec(PACKAGES[SIDES[name].library]) is None}
    if missing:
        print(f"left out, not installed: {', '.join(sorted(missing))}", flush=True)
    return tuple(name for name in names if name not in missing)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    workloads = [WORKLOADS[name] for name in pick(options.workload, WORKLOADS, ("llama8b-lora",))]
    sides = [SIDES[name] for name in pick(options.sides, SIDES, installed(DEFAULT_SIDES))]
    options.checkpoints = options.checkpoints.absolute()
    options.logs = options.logs.absolute() if options.logs else None
    failed = 0
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        reports = []
        for workload in workloads:
            results = run_workload(workload, sides, options, Path(folder))
            failed += sum("error" in result for result in results)
            reports.append(report(workload, results))
            print("\n" + reports[-1] + "\n", flush=True)
            if options.json:
                print("\n".join(json.dumps(result) for result in results), flush=True)
            if options.out:
                append_csv(options.out, results)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
