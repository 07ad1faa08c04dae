"""A search for settings by one process, by several workers of one GPU, and over several GPUs: time, memory, losses.

    python -m benchmarks.search --workload qwen1.5b-lora --trials 12 --steps 30 --workers 3
    python -m benchmarks.search --workload tiny --trials 4 --steps 3 --workers 2              # without a GPU

The trials are learning rates and two ranks, the same in every way, on random rows. Each way is a process of its own
(with its workers): *one* trains trial after trial, *workers* start as many as `--workers` says on the first GPU, where
they have one base, and *gpus* as many on every GPU. Seconds are those of the whole search, loading and recording
included, and "s/trial" those of a further trial once every worker has finished one. Memory is what all GPUs hold more
than before, or without a GPU what the processes hold of the host's. A trial's loss depends on its settings alone, so
that all ways should give the same ones.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.command import add_process_arguments, outcome, parser_of, settle, workload_of
from benchmarks.libraries import TARGETS, dtype_of
from benchmarks.memory_watch import MemoryWatch
from benchmarks.models import CONFIGS
from benchmarks.registry import Workload
from benchmarks.rows import columns
from benchmarks.run import checkpoint_folder, roomy_folder, run_module
from benchmarks.side import RESULT_PREFIX, versions
from benchmarks.table import plain_table

WAYS = ("one", "workers", "gpus")
RANKS = (8, 16)
RATES = (5e-5, 2e-3)
#: rows of the held-out loss
HELD_OUT = 16


def axes(trials: int) -> dict[str, list[float]]:
    """So many points: rates between `RATES`, even in the logarithm, and two ranks where that divides them."""
    ranks = RANKS if trials % 2 == 0 else RANKS[:1]
    count = trials // len(ranks)
    low, high = RATES
    rates = [float(f"{low * (high / low) ** (i / max(count - 1, 1)):.3g}") for i in range(count)]
    return {"learning_rate": rates, "r": list(ranks)}


def task_of(workload: Workload, checkpoint: Path, steps: int) -> Any:
    """What is searched: the workload's base, and random rows of its length."""
    import torch
    from datasets import Dataset

    from pronghorn import FastLanguageModel, SFTConfig
    from pronghorn.experiments.search import Task

    vocabulary, count = CONFIGS[workload.model]["vocab_size"], steps * workload.rows
    rows, held_out = (
        Dataset.from_dict(columns(number, workload.length, vocabulary, lengths=workload.lengths, seed=seed))
        for number, seed in ((count, 0), (HELD_OUT, 1))
    )
    settings = SFTConfig(
        max_steps=steps,
        per_device_train_batch_size=workload.rows,
        per_device_eval_batch_size=workload.rows,
        max_length=workload.length,
        lr_scheduler_type="constant",
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        seed=3407,
    )
    load = partial(
        FastLanguageModel.from_pretrained,
        str(checkpoint),
        max_seq_length=workload.length,
        dtype=dtype_of(workload),
        load_in_4bit=workload.four_bit,
    )
    adapter = {"lora_alpha": 32, "target_modules": TARGETS}
    return Task(load=load, rows=rows, held_out=held_out, settings=settings, adapter=adapter)


def measure(workload: Workload, checkpoint: Path, *, way: str, workers: int, trials: int, steps: int) -> dict:
    """Search in this process and its workers; each trial is printed as it ends."""
    if way != "gpus":
        # Before torch looks for GPUs: the others stay out of sight.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    import torch

    from pronghorn.experiments.search import Space, search

    task, began = task_of(workload, checkpoint, steps), time.perf_counter()
    ends: list[float] = []

    def tell(trial: Any) -> None:
        outcome = f"loss {trial.loss:.6f}" if trial.loss is not None else f"{trial.status}, {trial.reason}"
        settings = ", ".join(f"{name} {value:g}" for name, value in trial.settings.items())
        ends.append(time.perf_counter() - began)
        print(f"{way}, trial {trial.number}: {settings}: {outcome} (at {ends[-1]:.1f} s)", flush=True)

    with tempfile.TemporaryDirectory(prefix="bench-search-") as folder:
        result = search(task, Space(axes(trials)), folder, workers=workers, on_trial=tell)
    seconds = time.perf_counter() - began
    done = [trial for trial in result.trials if trial.status == "done"]
    tokens = sum(trial.steps * workload.rows * workload.length for trial in done)
    return {
        "seconds": seconds,
        "done": len(done),
        "tokens_per_s": tokens / seconds,
        "s_per_trial": later(ends, workers),
        "before": result.before,
        "losses": {json.dumps(trial.settings): trial.loss for trial in done},
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": versions(),
    }


def later(ends: list[float], workers: int) -> float | None:
    """Seconds of a further trial, from when each worker has finished one; None where there is none."""
    return (ends[-1] - ends[workers - 1]) / (len(ends) - workers) if len(ends) > workers else None


# --- the processes -----------------------------------------------------------------------------------------------


def run_way(
    workload: Workload, way: str, workers: int, options: argparse.Namespace, work: Path, checkpoint: Path
) -> dict[str, Any]:
    """One way's row, or one with `error`."""
    arguments = ["--workload", workload.name, "--checkpoint", str(checkpoint), "--way", way]
    for name, value in (("workers", workers), ("trials", options.trials), ("steps", options.steps)):
        arguments += [f"--{name}", str(value)]

    def tell(line: str) -> None:
        if line.startswith((f"{way}, trial ", "pronghorn: ")):
            print(line, flush=True)

    with MemoryWatch() as memory:
        status, output = run_module(
            "benchmarks.search",
            arguments,
            work=work,
            library="pronghorn",
            timeout=options.timeout,
            log=(options.logs or work) / f"search-{way}.log",
            tell=tell,
        )
    row = {"way": way, "workers": workers, "workload": workload.name, "memory_gib": memory.peak_gib}
    return row | outcome(status, output, options.timeout)


def compare(rows: list[dict[str, Any]]) -> None:
    """Add `losses_differ`, the largest difference from the first way's losses, and `compared`, of how many trials."""
    first = next((row["losses"] for row in rows if "losses" in row), {})
    for row in rows:
        alike = first.keys() & row.get("losses", {}).keys()
        row["compared"] = len(alike)
        row["losses_differ"] = max((abs(row["losses"][key] - first[key]) for key in alike), default=None)


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each way; ratios are to the first one."""
    base, lines = next((row for row in rows if "error" not in row), None), []
    for row in rows:
        memory = "" if row["memory_gib"] is None else f"{row['memory_gib']:.2f}"
        if "error" in row:
            lines.append(
                [row["way"], str(row["workers"]), "failed", "", "", "", "", memory, row["error"][:80]]
            )
            continue
        assert base is not None
        differ = row["losses_differ"]
        losses = "" if differ is None else "equal" if differ == 0 else f"differ by {differ:.1e}"
        lines.append(
            [
                row["way"],
                str(row["workers"]),
                str(row["done"]),
                f"{row['seconds']:.1f}",
                f"{base['seconds'] / row['seconds']:.2f}x",
                "" if row["s_per_trial"] is None else f"{row['s_per_trial']:.2f}",
                f"{row['tokens_per_s']:,.0f}",
                memory,
                losses,
            ]
        )
    header = ("way", "workers", "trials", "seconds", f"vs {WAYS[0]}", "s/trial", "tok/s", "GiB", "losses")
    return plain_table(header, lines)


def ways_of(workers: int, gpus: int) -> list[tuple[str, int]]:
    """The ways that a machine has, with their workers."""
    found = [("one", 1), ("workers", workers)]
    return [*found, ("gpus", workers * gpus)] if gpus > 1 else found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of("search", __doc__)
    parser.add_argument("--workload", default="qwen1.5b-lora")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30, help="of each trial")
    parser.add_argument("--workers", type=int, default=3, help="processes of one GPU")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    add_process_arguments(parser, 600.0, "way")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if min(options.trials, options.steps, options.workers) < 1:
        parser.error("--trials, --steps and --workers: one at least")
    settle(options)
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    workload = workload_of(options.workload, options.layers)
    if options.way is not None:
        row = measure(
            workload, options.checkpoint, way=options.way, workers=options.workers, trials=options.trials,
            steps=options.steps,
        )  # fmt: skip
        print(RESULT_PREFIX + json.dumps(row), flush=True)
        return 0
    import torch

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=roomy_folder()) as folder:
        work = Path(folder)
        options.checkpoints = options.checkpoints or work / "checkpoints"
        checkpoint = checkpoint_folder(options, work, workload.model)
        for way, workers in ways_of(options.workers, torch.cuda.device_count()):
            if way not in options.ways.split(","):
                continue
            rows.append(run_way(workload, way, workers, options, work, checkpoint))
            compare(rows)
            if options.json:
                print(json.dumps(rows[-1]), flush=True)
            print(f"{table(rows[-1:])}\n", flush=True)
    print(table(rows), flush=True)
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
