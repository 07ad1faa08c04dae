"""Where a training step's time goes: the kernels by GPU time, how busy the GPU is, launches a step.

    python -m benchmarks.profile --workload qwen1.5b-lora --side pronghorn-all --checkpoint DIR

The checkpoint folder is written by `python -m benchmarks.models` (or left by `benchmarks.run`).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.libraries import Job, build_trainer, import_library
from benchmarks.models import CONFIGS
from benchmarks.registry import Side, Workload, find_side, find_workload
from benchmarks.rows import columns
from benchmarks.side import documents_needed
from benchmarks.table import plain_table


def profile_steps(
    workload: Workload, side: Side, checkpoint: Path, warmup: int, steps: int
) -> tuple[Any, float]:
    """torch.profiler over `steps` steps after the warm-up, and their wall-clock seconds."""
    import_library(side.library)
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    profiler = profile(activities=activities)
    clock = {"begin": 0.0, "wall": 0.0}

    class Recording(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_gpu and state.global_step in (warmup, warmup + steps):
                torch.cuda.synchronize()
            if state.global_step == warmup:
                profiler.start()
                clock["begin"] = time.perf_counter()
            elif state.global_step == warmup + steps:
                clock["wall"] = time.perf_counter() - clock["begin"]
                profiler.stop()

    total = warmup + steps
    rows = columns(
        documents_needed(workload, side, total),
        workload.length,
        CONFIGS[workload.model]["vocab_size"],
        lengths=workload.lengths,
    )
    optimizer = "adamw_torch_fused" if on_gpu else "adamw_torch"
    with tempfile.TemporaryDirectory(prefix="bench-out-") as output:
        trainer = build_trainer(Job(workload, side, checkpoint, Path(output), total, optimizer), rows)
        trainer.add_callback(Recording())
        trainer.train()
    return profiler, clock["wall"]


def kernel_totals(profiler: Any) -> dict[str, tuple[float, int]]:
    """Kernel name -> (milliseconds on the GPU, calls). Without a GPU, operators and their own CPU time."""
    totals: dict[str, tuple[float, int]] = {}
    events = list(profiler.events())
    on_device = [e for e in events if str(e.device_type).endswith("CUDA")]
    for event in on_device or events:
        microseconds = event.time_range.elapsed_us() if on_device else event.self_cpu_time_total
        spent, calls = totals.get(event.name, (0.0, 0))
        totals[event.name] = (spent + microseconds / 1e3, calls + 1)
    return totals


def spans(profiler: Any) -> list[tuple[float, float, str]]:
    """When each kernel began and ended, in microseconds, and its name; by their beginnings."""
    return sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in profiler.events()
        if str(e.device_type).endswith("CUDA")
    )


def busy_ms(profiler: Any) -> float:
    """Milliseconds in which at least one kernel ran (overlaps counted once)."""
    busy, reached = 0.0, float("-inf")
    for start, end, _ in spans(profiler):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e3


def gaps(profiler: Any) -> dict[tuple[str, str], tuple[float, int]]:
    """(kernel before, kernel after) -> (milliseconds in which nothing ran between them, how often)."""
    found: dict[tuple[str, str], tuple[float, int]] = {}
    reached, before = float("inf"), ""
    for start, end, name in spans(profiler):
        if start > reached:
            idle, count = found.get((before, name), (0.0, 0))
            found[before, name] = idle + (start - reached) / 1e3, count + 1
        if end > reached or not before:
            reached, before = end, name
    return found


def gap_table(profiler: Any, steps: int, top: int) -> str:
    """The `top` places where the GPU waited, and how long all gaps are, per step."""
    found = gaps(profiler)
    lines = [
        [before[:50], after[:50], f"{idle / steps:.3f}", f"{count / steps:.1f}", f"{idle / count * 1e3:.1f}"]
        for (before, after), (idle, count) in sorted(found.items(), key=lambda item: -item[1][0])[:top]
    ]
    whole = sum(idle for idle, _ in found.values()) / steps
    return (
        plain_table(("after", "before", "idle ms/step", "times", "us each"), lines)
        + f"\nidle {whole:.2f} ms/step"
    )


def summary(profiler: Any, wall_s: float, steps: int, top: int = 25) -> str:
    """The table of the `top` kernels and one line of totals, all per step."""
    totals = kernel_totals(profiler)
    whole = sum(spent for spent, _ in totals.values()) or 1.0
    lines = [
        [name[:90], f"{spent / steps:.3f}", f"{spent / whole:.1%}", f"{calls / steps:.1f}"]
        for name, (spent, calls) in sorted(totals.items(), key=lambda item: -item[1][0])[:top]
    ]
    launches = sum(calls for _, calls in totals.values()) / steps
    busy = busy_ms(profiler) / steps
    return (
        plain_table(("kernel", "ms/step", "share", "calls/step"), lines)
        + f"\nwall {wall_s / steps * 1e3:.1f} ms/step (with the profiler on), GPU busy {busy:.1f} ms/step, "
        + f"kernels {whole / steps:.1f} ms/step, {launches:.0f} kernels and copies a step"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("--workload", default="qwen1.5b-lora", type=find_workload)
    parser.add_argument("--side", default="pronghorn-all", type=find_side)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=25)
    parser.add_argument("--gaps", type=int, default=0, help="show so many places where the GPU waits")
    parser.add_argument("--trace", type=Path, help="write a Chrome trace here")
    options = parser.parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    workload, side = options.workload, options.side
    profiler, wall = profile_steps(workload, side, options.checkpoint, options.warmup, options.steps)
    print(f"{workload.name}, {side.name}\n{summary(profiler, wall, options.steps, options.top)}", flush=True)
    if options.gaps:
        print(gap_table(profiler, options.steps, options.gaps), flush=True)
    if options.trace:
        profiler.export_chrome_trace(str(options.trace))
    return 0


if __name__ == "__main__":
    sys.exit(main())
