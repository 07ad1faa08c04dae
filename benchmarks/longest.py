"""The longest single row that a side trains within a memory cap, and the time of a step at each length tried.

    python -m benchmarks.longest --caps 24,80 --sides unsloth,pronghorn-offload --checkpoints DIR
    python -m benchmarks.longest --caps 24 --sides unsloth,pronghorn-22GiB --lengths 98304,196608 --steps 1

One process a side and cap: the model is loaded once, then rows of growing length are trained for two steps each, until
one runs out of memory; between the last that fitted and the first that did not, the search halves the interval. Where a
step takes minutes, `--lengths` tries just these, each in a process of its own: one that fails, or is ended after
`--seconds`, ends no other. What a row wants of the host's memory is printed before it is trained, and all else as it
comes. The cap is torch's allocator limit, less 0.8 GiB for the CUDA context.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.host_memory import available, wanted
from benchmarks.libraries import Job, Loaded, import_library, load_model, make_trainer
from benchmarks.models import CONFIGS
from benchmarks.registry import Side, Workload, find_side, find_workload
from benchmarks.rows import columns
from benchmarks.side import RESULT_PREFIX, Stopwatch, cap_memory, peak_memory, versions, watch

#: lengths are multiples of it
GRAIN = 1024


@dataclass(frozen=True)
class Attempt:
    """One length: seconds of a step (the first does not count where there are several) and peak reserved GiB, or why it
    failed."""

    length: int
    step_s: float = 0.0
    reserved_gib: float = 0.0
    error: str = ""


def search(
    attempt: Callable[[int], Attempt], first: int, most: int, resolution: float, deadline: float
) -> Iterator[Attempt]:
    """Attempts at doubling lengths from `first` up to `most`, then between the longest that fitted and the shortest
    that did not, until they are within `resolution` of one another or the time is up."""
    fits, fails, length = 0, most + GRAIN, first
    while time.time() < deadline:
        found = attempt(length)
        yield found
        if found.error:
            fails = length
        else:
            fits = length
        if fits == 0:
            length = length // 2
            if length < GRAIN:
                return
        elif fails > most:
            if fits == most:
                return
            length = min(most, 2 * length)
        else:
            if fails - fits <= max(GRAIN, resolution * fits):
                return
            length = (fits + fails) // 2 // GRAIN * GRAIN


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or one that caused it, is about memory."""
    seen: BaseException | None = error
    while seen is not None:
        text = f"{type(seen).__name__}: {seen}".lower()
        if "out of memory" in text or "outofmemory" in text:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def train_row(job: Job, loaded: Loaded, length: int) -> Attempt:
    """The job's steps of one row; what it held is given back."""
    import torch

    workload = dataclasses.replace(job.workload, rows=1, length=length)
    job = dataclasses.replace(job, workload=workload)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rows = columns(job.steps, length, CONFIGS[workload.model]["vocab_size"])
    # A step that is alone is timed from its beginning, which only a stopwatch with turns notes.
    warmup = min(1, job.steps - 1)
    timed = job.steps - warmup
    stopwatch = Stopwatch(warmup, timed, time.time(), None if warmup else lambda: None)
    error = ""
    try:
        trainer = make_trainer(job, loaded, rows)
        watch(trainer, stopwatch)
        trainer.train()
        if int(stopwatch.timed(stopwatch.real_tokens)) != length * timed:
            error = "the row was cut"
    except Exception as failure:  # the search goes on with a shorter row
        kind = "out of memory" if is_out_of_memory(failure) else type(failure).__name__
        error = f"{kind}: {' '.join(str(failure).split())[:200]}"
    trainer = None
    reserved = peak_memory()[1]
    loaded.model.zero_grad(set_to_none=True)
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return Attempt(length, stopwatch.region_s / timed, reserved, error)


def find_longest(
    workload: Workload, side: Side, checkpoint: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Load, search, and return a row for the table; each attempt is printed as it ends."""
    import_library(side.library)
    import torch

    cap_memory(workload.cap_gib)
    optimizer = "adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch"
    # A library may size its position tables by the longest row it is told of.
    most = max(options.lengths or [options.most])
    job = Job(dataclasses.replace(workload, length=most), side, checkpoint, Path(), options.steps, optimizer)
    attempts: list[Attempt] = []
    with tempfile.TemporaryDirectory(prefix="bench-out-") as output:
        job = dataclasses.replace(job, output=Path(output))
        loaded = load_model(job)
        deadline = time.time() + options.seconds

        def attempt(length: int) -> Attempt:
            print(f"{side.name} {length:,} tokens: wants {wanted(job, loaded, length)}", flush=True)
            return train_row(job, loaded, length)

        for found in (
            map(attempt, options.lengths)
            if options.lengths
            else search(attempt, options.first, options.most, options.resolution, deadline)
        ):
            attempts.append(found)
            print(f"{side.name} {describe(found)}", flush=True)
    fitted = max((a for a in attempts if not a.error), key=lambda a: a.length, default=None)
    return {
        "workload": workload.name,
        "side": side.name,
        "label": side.label(workload),
        "cap_gib": workload.cap_gib,
        "longest": fitted.length if fitted else 0,
        "attempts": [dataclasses.asdict(a) for a in attempts],
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": versions(),
    }


def describe(found: Attempt) -> str:
    outcome = found.error or f"{found.step_s:.2f} s a step, {found.reserved_gib:.1f} GiB reserved"
    return f"{found.length:,} tokens: {outcome}"


def table(rows: list[dict[str, Any]]) -> str:
    """One line a side and cap: the longest row, the ratio to the baseline, its step time, and all attempts."""
    from benchmarks.registry import BASELINE
    from benchmarks.table import plain_table

    lines = []
    for row in rows:
        if "error" in row:
            lines.append([row["side"], f"{row['cap_gib']:g}", "failed", "", "", row["error"][:80]])
            continue
        base = next((r for r in rows if r["side"] == BASELINE and r["cap_gib"] == row["cap_gib"]), {})
        ratio = f"{row['longest'] / base['longest']:.2f}x" if base.get("longest") else ""
        good = {a["length"]: a for a in row["attempts"] if not a["error"]}
        top = good.get(row["longest"], {"step_s": 0.0})
        steps = ", ".join(f"{length // 1024}k {good[length]['step_s']:.1f}" for length in sorted(good))
        lines.append(
            [row["side"], f"{row['cap_gib']:g}", f"{row['longest']:,}", ratio, f"{top['step_s']:.1f}", steps]
        )
    header = ("side", "cap GiB", "longest row", f"vs {BASELINE}", "s/step", "seconds a step by length")
    return plain_table(header, lines)


def run_all(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row of each side within each cap; every side in its own process, and with `--lengths` every length."""
    from benchmarks.command import workload_of
    from benchmarks.run import checkpoint_folder, parse

    base = workload_of(options.workload, options.layers)
    common = parse(["--checkpoints", str(options.checkpoints)] if options.checkpoints else [])
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        work = Path(folder)
        checkpoint = checkpoint_folder(common, work, base.model)
        for cap in options.caps.split(","):
            for side in (find_side(name) for name in options.sides.split(",")):
                print(f"{side.name} within {cap} GiB: {available()}", flush=True)
                workload = find_workload(f"{base.name}@{cap}")
                parts = [[length] for length in options.lengths or ()] or [None]
                yield joined([run_part(workload, side, part, checkpoint, options, work) for part in parts])


def run_part(
    workload: Workload,
    side: Side,
    lengths: list[int] | None,
    checkpoint: Path,
    options: argparse.Namespace,
    work: Path,
) -> dict[str, Any]:
    """The row of one process, which tries these lengths or searches; with `error` where the process failed."""
    from benchmarks.command import outcome
    from benchmarks.run import run_module

    arguments = ["--workload", workload.name, "--side", side.name, "--checkpoint", str(checkpoint)]
    for setting in ("first", "most", "resolution", "seconds", "steps"):
        arguments += [f"--{setting}", str(getattr(options, setting))]
    if lengths:
        arguments += ["--lengths", ",".join(map(str, lengths))]
    # Loading and a last attempt begun just in time.
    timeout = options.seconds + 240
    log = (options.logs or work) / f"{workload.name}-{side.name}-{lengths[0] if lengths else 'search'}.log"

    def tell(line: str) -> None:
        if line.startswith(f"{side.name} ") or "memory plan" in line:
            print(line, flush=True)

    status, output = run_module(
        "benchmarks.longest", arguments, work=work, library=side.library, timeout=timeout, log=log, tell=tell
    )
    found = outcome(status, output, timeout)
    if "error" not in found:
        return found
    error = found["error"]
    what = f"{lengths[0]:,} tokens" if lengths else "the search"
    print(f"{side.name} {what}: failed: {error}", flush=True)
    attempts = [dataclasses.asdict(Attempt(length, error=error)) for length in lengths or ()]
    return {
        "workload": workload.name, "side": side.name, "cap_gib": workload.cap_gib, "longest": 0,
        "attempts": attempts, "error": error,
    }  # fmt: skip


def joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of several processes' rows; an error where none of them got through."""
    whole = [row for row in rows if "error" not in row]
    attempts = [attempt for row in rows for attempt in row["attempts"]]
    return {**(whole or rows)[0], "longest": max(row["longest"] for row in rows), "attempts": attempts}


def lengths(text: str) -> list[int]:
    """ "65536,196608" as numbers."""
    return [int(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.longest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workload", default="llama8b-qlora")
    parser.add_argument("--sides", default="unsloth,pronghorn-offload")
    parser.add_argument("--caps", default="24", help="GiB, comma-separated")
    parser.add_argument("--first", type=int, default=16384, help="tokens of the first row tried")
    parser.add_argument("--most", type=int, default=1 << 20, help="tokens of the longest row tried")
    parser.add_argument("--lengths", type=lengths, help="try just these, comma-separated")
    parser.add_argument("--steps", type=int, default=2, help="steps of each length")
    parser.add_argument("--resolution", type=float, default=0.1, help="as a share of the length")
    parser.add_argument(
        "--seconds", type=float, default=200.0, help="time for one side's search, or for one length"
    )
    parser.add_argument("--layers", type=int, help="of a shallower model (default: the workload's)")
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--json", action="store_true", help="print each side's row as a JSON line, too")
    parser.add_argument("--logs", type=Path, help="folder for each process's whole output")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--side", type=find_side, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.side is not None:
        row = find_longest(find_workload(options.workload), options.side, options.checkpoint, options)
        print(RESULT_PREFIX + json.dumps(row), flush=True)
        return 0
    options.logs = options.logs.absolute() if options.logs else None
    rows = []
    for row in run_all(options):
        rows.append(row)
        if options.json:
            print(json.dumps(row), flush=True)
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows), flush=True)
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
