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
from collections import defaultdict
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.libraries import Job, batch_shape, build_trainer, import_library
from benchmarks.models import CONFIGS, FIRST_TOKEN
from benchmarks.registry import Side, Workload, find_side, find_workload
from benchmarks.rows import DISTRIBUTIONS, UNSUPERVISED, columns

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
    "nvidia-cudnn-frontend",
    "pronghorn",
)
#: import names that are not the package's with underscores
IMPORTED_AS = {"nvidia-cudnn-frontend": "cudnn"}
#: device memory outside torch's allocator: the CUDA context and libraries' handles
OUTSIDE_GIB = 0.8


class Stopwatch:
    """Times a trainer's steps; installed by `watch`.

    Args:
        turn: called between steps; what it waits for does not count. Steps are then timed one by one.
    """

    def __init__(
        self, warmup: int, steps: int, started: float, turn: Callable[[], None] | None = None
    ) -> None:
        self.warmup, self.steps, self.started, self.turn = warmup, steps, started, turn
        self.first_step_s = self.region_s = 0.0
        self.peak_before: tuple[float, float] = (0.0, 0.0)
        self.peak_timed: tuple[float, float] = (0.0, 0.0)
        self.real_tokens: dict[int, list[Any]] = defaultdict(list)
        self.supervised: dict[int, list[Any]] = defaultdict(list)
        self._marks: list[Any] = []
        self._single_ms: list[float] = []
        self._begin = self._turn_began = 0.0

    def begin(self) -> None:
        """Called before the first step."""
        if self.turn is not None:
            self.turn()
            self._turn_began = time.perf_counter()

    def step_end(self, step: int) -> None:
        """Called after optimizer step `step`, counted from one."""
        import torch

        on_gpu = torch.cuda.is_available()
        if on_gpu and (self.turn is not None or step in (1, self.warmup, self.warmup + self.steps)):
            torch.cuda.synchronize()
        now = time.perf_counter()
        if step == 1:
            self.first_step_s = time.time() - self.started
        if self.warmup < step <= self.warmup + self.steps and self.turn is not None:
            self._single_ms.append((now - self._turn_began) * 1e3)
        if step == self.warmup:
            self.peak_before = peak_memory()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            self._begin = time.perf_counter()
        if step == self.warmup + self.steps:
            self.region_s = now - self._begin if self.turn is None else sum(self._single_ms) / 1e3
            self.peak_timed = peak_memory()
        if self.warmup <= step <= self.warmup + self.steps:
            self._marks.append(_mark(on_gpu))
        if self.turn is not None and step < self.warmup + self.steps:
            self.turn()
            self._turn_began = time.perf_counter()

    def step_times_ms(self) -> list[float]:
        """Milliseconds of each timed step."""
        if self.turn is not None:
            return self._single_ms
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._marks and not isinstance(self._marks[0], float):
            return [before.elapsed_time(after) for before, after in pairs]
        return [(after - before) * 1e3 for before, after in pairs]

    def timed(self, counts: dict[int, list[Any]]) -> int:
        """The sum of per-batch counts over the timed steps."""
        steps = range(self.warmup + 1, self.warmup + self.steps + 1)
        return sum(int(count) for step in steps for count in counts[step])


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
    """Add a callback that times steps, and count tokens: real ones (ids below FIRST_TOKEN are padding), and those
    that a loss is computed for (the first of a row is predicted by nothing)."""
    from transformers import TrainerCallback

    class Timing(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stopwatch.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stopwatch.step_end(state.global_step)

    trainer.add_callback(Timing())
    training_step = trainer.training_step

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        step = trainer.state.global_step + 1
        stopwatch.real_tokens[step].append((inputs["input_ids"] >= FIRST_TOKEN).sum())
        stopwatch.supervised[step].append((inputs["labels"][:, 1:] != UNSUPERVISED).sum())
        return training_step(model, inputs, *args, **kwargs)

    trainer.training_step = counted


def documents_needed(workload: Workload, side: Side, steps: int) -> int:
    """Rows for `steps` optimizer steps; a side that packs gets a fifth more than its mean needs."""
    rows, accumulation = batch_shape(workload, side)
    if side.packing and workload.mixed:
        mean = min(DISTRIBUTIONS[workload.lengths].mean, workload.length)
        return int(1.2 * steps * rows * accumulation * workload.length / mean) + 8
    return steps * rows * accumulation


def cap_memory(gib: float | None) -> None:
    """Let this process hold `gib` of device memory, what lies outside torch's allocator included."""
    import torch

    if gib is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (gib - OUTSIDE_GIB) * GIB / total))


def measure(
    workload: Workload,
    side: Side,
    checkpoint: Path,
    *,
    warmup: int,
    steps: int,
    started: float,
    turn: Callable[[], None] | None = None,
) -> dict:
    """Train `warmup + steps` steps and return the result row."""
    import_library(side.library)
    import torch

    cap_memory(workload.cap_gib)
    total = warmup + steps
    rows = columns(
        documents_needed(workload, side, total),
        workload.length,
        CONFIGS[workload.model]["vocab_size"],
        lengths=workload.lengths,
    )
    optimizer = "adamw_torch_fused" if torch.cuda.is_available() else "adamw_torch"
    with tempfile.TemporaryDirectory(prefix="bench-out-") as output:
        trainer = build_trainer(Job(workload, side, checkpoint, Path(output), total, optimizer), rows)
        loaded_s = time.time() - started
        stopwatch = Stopwatch(warmup, steps, started, turn)
        watch(trainer, stopwatch)
        trainer.train()
    if not stopwatch.region_s:
        raise RuntimeError(f"the trainer stopped before step {total}")
    return _result(workload, side, stopwatch, trainer, loaded_s, steps)


def _result(
    workload: Workload, side: Side, watch: Stopwatch, trainer: Any, loaded_s: float, steps: int
) -> dict:
    import torch

    times, tokens = watch.step_times_ms(), watch.timed(watch.real_tokens)
    # Steps taken in turn share the machine with nobody, but for what else runs on it: the median leaves that out.
    region_s = watch.region_s if watch.turn is None else median(times) * steps / 1e3
    ordered = sorted(times)
    whole = [max(pair) for pair in zip(watch.peak_before, watch.peak_timed, strict=True)]
    on_gpu, logs = torch.cuda.is_available(), trainer.state.log_history
    return {
        "workload": workload.name,
        "side": side.name,
        "label": side.label(workload),
        "ms_per_step": region_s / steps * 1e3,
        "ms_median": median(times),
        "ms_p10": ordered[len(ordered) // 10],
        "ms_p90": ordered[(len(ordered) * 9) // 10],
        "steps": steps,
        "tokens_per_step": tokens / steps,
        "tokens_per_s": tokens / region_s,
        "supervised_per_s": watch.timed(watch.supervised) / region_s,
        "peak_allocated_gib": watch.peak_timed[0],
        "peak_reserved_gib": watch.peak_timed[1],
        "whole_allocated_gib": whole[0],
        "whole_reserved_gib": whole[1],
        "loaded_s": loaded_s,
        "first_step_s": watch.first_step_s,
        "first_loss": next((entry["loss"] for entry in logs if entry["step"] == 1 and "loss" in entry), None),
        "mean_loss": next((entry["train_loss"] for entry in logs if "train_loss" in entry), None),
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "hardware": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "versions": versions(),
        "kernels": kernels_used(side, trainer),
        "attention": attention_used(side, trainer),
        "steps_run": steps_run(side, trainer),
    }


def versions() -> dict[str, str]:
    """Versions of what is installed and loaded in this process."""
    found = {}
    for package in PACKAGES:
        if IMPORTED_AS.get(package, package.replace("-", "_")) in sys.modules or package in (
            "torch",
            "transformers",
        ):
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


def attention_used(side: Side, trainer: Any) -> str:
    """The attention implementation, in a word."""
    if side.library == "unsloth":
        return _unsloth_attention()
    if side.library != "pronghorn":
        return str(getattr(trainer.model.config, "_attn_implementation", "?"))
    from pronghorn.engine import binding_of

    binding = binding_of(trainer.model)
    lines = binding.describe().splitlines() if binding is not None else []
    named = [line.split(":", 1)[1] for line in lines if line.strip().startswith("attention:")]
    return named[0].split("(")[0].strip() if named else "stock"


def _unsloth_attention() -> str:
    """What Unsloth's attention dispatch picks for packed or causal input, as far as it tells."""
    from importlib import import_module

    try:
        dispatch = import_module("unsloth.utils.attention_dispatch")
    except ImportError:
        return "?"
    for name, label in (("HAS_FLASH_ATTENTION", "flash_attn"), ("HAS_XFORMERS", "xformers")):
        if getattr(dispatch, name, False):
            return label
    return "sdpa"


def steps_run(side: Side, trainer: Any) -> str:
    """Whether steps were replayed as CUDA graphs: "captured", "eager", or why not."""
    static = getattr(trainer, "_steps", None)
    step = getattr(static, "_step", None)
    if side.library != "pronghorn" or static is None:
        return "eager"
    captured = getattr(step, "captured", 0)
    if captured:
        return f"captured ({captured} in {getattr(step, 'capture_seconds', 0.0):.1f} s)"
    reason = getattr(static, "_why_not", None) or getattr(step, "reason", None)
    return f"eager: {reason}" if reason else "eager"


def turns(read_fd: int, write_fd: int) -> Callable[[], None]:
    """A function that says it is ready on one pipe and waits for a byte on the other."""

    def wait() -> None:
        os.write(write_fd, b"r")
        if not os.read(read_fd, 1):
            raise RuntimeError("the other end of the pipe was closed")

    return wait


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.side", description=__doc__)
    parser.add_argument("--workload", required=True, type=find_workload)
    parser.add_argument("--side", required=True, type=find_side)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--warmup", type=int)
    parser.add_argument("--turns", help="READ,WRITE file descriptors: each step waits for its turn")
    parser.add_argument(
        "--started", type=float, default=time.time(), help="Unix time the process was started at"
    )
    arguments = parser.parse_args(argv)
    workload = arguments.workload
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    result = measure(
        workload,
        arguments.side,
        arguments.checkpoint,
        warmup=arguments.warmup or workload.warmup,
        steps=arguments.steps or workload.steps,
        started=arguments.started,
        turn=turns(*map(int, arguments.turns.split(","))) if arguments.turns else None,
    )
    print(RESULT_PREFIX + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
