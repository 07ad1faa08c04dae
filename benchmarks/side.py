"""One side of one workload in this process: build, train, measure, print one JSON line.

    python -m benchmarks.side --workload tiny --side hf --checkpoint DIR

Timing: one region of `steps` optimizer steps after the warm-up, a device synchronisation at both ends and none
between. CUDA events at the step boundaries give the median step beside the region's mean. Peak memory is read over
the timed region and over the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.libraries import MIXED_MEAN, Job, build_trainer, import_library, rows_per_batch
from benchmarks.models import CONFIGS, FIRST_TOKEN
from benchmarks.registry import SIDES, WORKLOADS, Side, Workload
from benchmarks.rows import token_rows

GIB = 1 << 30
RESULT_PREFIX = "BENCHMARK_RESULT "
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "triton",
    "bitsandbytes",
    "unsloth",
    "liger-kernel",
    "pronghorn",
)


class Stopwatch:
    """Times a trainer's steps; installed by `watch`."""

    def __init__(self, warmup: int, steps: int, started: float) -> None:
        self.warmup, self.steps, self.started = warmup, steps, started
        self.first_step_s = self.region_s = 0.0
        self.peak_before: tuple[float, float] = (0.0, 0.0)
        self.peak_timed: tuple[float, float] = (0.0, 0.0)
        self.real_tokens: list[Any] = []
        self.losses: dict[int, float] = {}
        self._marks: list[Any] = []
        self._begin = 0.0

    def step_end(self, step: int) -> None:
        """Called after optimizer step `step`, counted from one."""
        import torch

        on_gpu = torch.cuda.is_available()
        if on_gpu and step in (1, self.warmup, self.warmup + self.steps):
            torch.cuda.synchronize()
        now = time.perf_counter()
        if step == 1:
            self.first_step_s = time.time() - self.started
        if step == self.warmup:
            self.peak_before = peak_memory()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            self._begin = time.perf_counter()
        if step == self.warmup + self.steps:
            self.region_s = now - self._begin
            self.peak_timed = peak_memory()
        if self.warmup <= step <= self.warmup + self.steps:
            self._marks.append(_mark(on_gpu))

    def step_times_ms(self) -> list[float]:
        """Milliseconds of each timed step."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._marks and not isinstance(self._marks[0], float):
            return [before.elapsed_time(after) for before, after in pairs]
        return [(after - before) * 1e3 for before, after in pairs]

    def timed_tokens(self) -> int:
        """Real tokens of the timed batches."""
        return sum(int(count) for count in self.real_tokens[self.warmup : self.warmup + self.steps])


def _mark(on_gpu: bool) -> Any:
    if not on_gpu:
        return time.perf_counter()
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def peak_memory() -> tuple[float, float]:
    """Peak allocated and reserved GiB since the last reset; zeros without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB


def watch(trainer: Any, stopwatch: Stopwatch) -> None:
    """Add a callback that times steps, and count real tokens: ids below FIRST_TOKEN are padding."""
    from transformers import TrainerCallback

    class Timing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stopwatch.step_end(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            for key in ("loss", "train_loss"):
                if logs and key in logs:
                    stopwatch.losses[state.global_step if key == "loss" else -1] = float(logs[key])

    trainer.add_callback(Timing())
    training_step = trainer.training_step

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        stopwatch.real_tokens.append((inputs["input_ids"] >= FIRST_TOKEN).sum())
        return training_step(model, inputs, *args, **kwargs)

    trainer.training_step = counted


def measure(
    workload: Workload, side: Side, checkpoint: Path, *, warmup: int, steps: int, started: float
) -> dict:
    """Train `warmup + steps` steps and return the result row."""
    import_library(side.library)
    import torch

    total = warmup + steps
    documents = total * workload.rows
    if side.packing and workload.mixed:
        # Packed rows hold about length / MIXED_MEAN documents each; a fifth more, so that max_steps is reached.
        documents = int(1.2 * total * rows_per_batch(workload, side) * workload.length / MIXED_MEAN) + 8
    vocabulary = CONFIGS[workload.model]["vocab_size"]
    rows = token_rows(documents, workload.length, vocabulary, mixed=workload.mixed)
    optimizer = "adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch"
    with tempfile.TemporaryDirectory(prefix="bench-out-") as output:
        trainer = build_trainer(Job(workload, side, checkpoint, Path(output), total, optimizer), rows)
        loaded_s = time.time() - started
        stopwatch = Stopwatch(warmup, steps, started)
        watch(trainer, stopwatch)
        trainer.train()
    if not stopwatch.region_s:
        raise RuntimeError(f"the trainer stopped before step {total}")
    return _result(workload, side, stopwatch, trainer, loaded_s, steps)


def _result(
    workload: Workload, side: Side, watch: Stopwatch, trainer: Any, loaded_s: float, steps: int
) -> dict:
    import torch

    times, tokens = watch.step_times_ms(), watch.timed_tokens()
    ordered = sorted(times)
    whole = [max(pair) for pair in zip(watch.peak_before, watch.peak_timed, strict=True)]
    on_gpu = torch.cuda.is_available()
    return {
        "workload": workload.name,
        "side": side.name,
        "label": workload.label,
        "ms_per_step": watch.region_s / steps * 1e3,
        "ms_median": median(times),
        "ms_p10": ordered[len(ordered) // 10],
        "ms_p90": ordered[(len(ordered) * 9) // 10],
        "steps": steps,
        "tokens_per_step": tokens / steps,
        "tokens_per_s": tokens / watch.region_s,
        "peak_allocated_gib": watch.peak_timed[0],
        "peak_reserved_gib": watch.peak_timed[1],
        "whole_allocated_gib": whole[0],
        "whole_reserved_gib": whole[1],
        "loaded_s": loaded_s,
        "first_step_s": watch.first_step_s,
        "first_loss": watch.losses.get(1),
        "mean_loss": watch.losses.get(-1),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "hardware": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "versions": versions(),
        "kernels": kernels_used(side, trainer),
    }


def versions() -> dict[str, str]:
    """Versions of what is installed and loaded in this process."""
    found = {}
    for package in PACKAGES:
        if package.replace("-", "_") in sys.modules or package in ("torch", "transformers"):
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                found[package] = "source"
    return found


def kernels_used(side: Side, trainer: Any) -> str:
    """What the step ran on, as far as the library says."""
    if side.library == "pronghorn":
        from pronghorn.engine import binding_of

        binding = binding_of(trainer.model)
        return binding.describe() if binding is not None else "not bound"
    attention = getattr(trainer.model.config, "_attn_implementation", "?")
    return f"attention: {attention}; class: {type(trainer.model).__name__}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.side", description=__doc__)
    parser.add_argument("--workload", required=True, choices=WORKLOADS)
    parser.add_argument("--side", required=True, choices=SIDES)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--warmup", type=int)
    parser.add_argument(
        "--started", type=float, default=time.time(), help="Unix time the process was started at"
    )
    arguments = parser.parse_args(argv)
    workload = WORKLOADS[arguments.workload]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    result = measure(
        workload,
        SIDES[arguments.side],
        arguments.checkpoint,
        warmup=arguments.warmup or workload.warmup,
        steps=arguments.steps or workload.steps,
        started=arguments.started,
    )
    print(RESULT_PREFIX + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
