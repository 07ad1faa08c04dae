"""Seconds from the start of a process to the end of its first training step, by stages, for each library.

    python -m benchmarks.start --workload llama8b-lora --layers 8 --sides hf,unsloth,pronghorn
    python -m benchmarks.start --workload tiny --steps 2                                        # without a GPU

Every figure is of a process of its own, three of each side: *first* with empty compile caches and a checkpoint that the
page cache does not hold, *cold* with full compile caches and such a checkpoint, *warm* with both. The libraries' own
files are not dropped from the page cache. Modules that a process has to compile to bytecode are counted: where packages
were installed without it and it cannot be written, every process takes over twice as long to import them. Stages:

    imports     of the interpreter, torch and the library
    weights     the library's `from_pretrained`, with the CUDA context
    adapters    LoRA on the model (Transformers with TRL: in the next stage)
    trainer     from there to the first step; with `--notebook` also the import of the trainer's classes
    recording   what the first step takes more than a later one: plans, captures, compiling, the first optimizer step
    step        the median of the later ones
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.command import add_process_arguments, outcome, parser_of, settle, workload_of
from benchmarks.libraries import Job, import_library, load_model, make_trainer
from benchmarks.models import CONFIGS
from benchmarks.page_cache import cached_share, evict, warm
from benchmarks.registry import Side, Workload, find_side
from benchmarks.rows import columns
from benchmarks.run import checkpoint_folder, installed, run_module
from benchmarks.side import RESULT_PREFIX, documents_needed, steps_run, versions
from benchmarks.table import plain_table

STATES = ("first", "cold", "warm")
STAGES = ("imports", "weights", "adapters", "trainer", "recording", "step")
DEFAULT_SIDES = ("hf", "unsloth", "pronghorn")
#: what a side's script imports, by the names it takes from there
IMPORTS: dict[str, dict[str, tuple[str, ...]]] = {
    "hf": {
        "transformers": ("AutoModelForCausalLM", "AutoTokenizer", "BitsAndBytesConfig"),
        "peft": ("LoraConfig",),
        "trl": ("SFTConfig", "SFTTrainer"),
    },
    "unsloth": {"unsloth": ("FastLanguageModel",), "trl": ("SFTConfig", "SFTTrainer")},
    "pronghorn": {"pronghorn": ("FastLanguageModel", "SFTConfig", "SFTTrainer")},
}
IMPORTS["liger"] = IMPORTS["hf"]
#: of them, what a notebook imports in the cell that builds the trainer: with `--notebook` it is done there
OF_TRAINER = {"SFTConfig", "SFTTrainer"}


class Marks:
    """The stages' ends, in seconds since the process was started."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.ends: dict[str, float] = {}

    def __call__(self, name: str) -> None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.ends[name] = time.time() - self.started

    def stages(self, steps: int) -> dict[str, float]:
        """Seconds of each stage; `steps` were trained, two at least."""
        ends = [self.ends[f"step {number}"] for number in range(steps + 1)]
        first, later = ends[1] - ends[0], median(after - before for before, after in pairwise(ends[1:]))
        step = min(first, later)  # noise alone makes a later one longer
        before = [0.0, *(self.ends[name] for name in ("imports", "weights", "adapters")), ends[0]]
        found = [after - earlier for earlier, after in pairwise(before)]
        return dict(zip(STAGES, [*found, first - step, step], strict=True))


def measure(
    workload: Workload, side: Side, checkpoint: Path, *, steps: int, started: float, notebook: bool = False
) -> dict[str, Any]:
    """Train a few steps in this process, and return when what was done."""
    marks = Marks(started)
    import_library(side.library)
    later = OF_TRAINER if notebook else set()
    for module, names in IMPORTS[side.library].items():
        for name in names:
            if name not in later:
                getattr(import_module(module), name)
    import torch

    marks("imports")
    on_gpu = torch.cuda.is_available()
    optimizer = "adamw_torch_fused" if on_gpu else "adamw_torch"
    with tempfile.TemporaryDirectory(prefix="bench-out-") as output:
        job = Job(workload, side, checkpoint, Path(output), steps, optimizer)
        loaded = load_model(job, read=lambda: marks("weights"))
        marks("adapters")
        vocabulary = CONFIGS[workload.model]["vocab_size"]
        rows = columns(
            documents_needed(workload, side, steps), workload.length, vocabulary, lengths=workload.lengths
        )
        trainer = make_trainer(job, loaded, rows)
        losses = mark_steps(trainer, marks)
        trainer.train()
    if f"step {steps}" not in marks.ends:
        raise RuntimeError(f"the trainer stopped before step {steps}")
    return {
        "stages": marks.stages(steps),
        "total_s": marks.ends["step 1"],
        "compiled": compiled_since(started),
        "first_loss": losses.get(1),
        "steps_run": steps_run(side, trainer),
        "hardware": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "versions": versions(),
    }


def compiled_since(started: float) -> int:
    """How many of the imported modules had no bytecode before this time."""
    stored = [
        getattr(getattr(module, "__spec__", None), "cached", None) for module in list(sys.modules.values())
    ]
    return sum(not os.path.exists(path) or os.path.getmtime(path) >= started for path in stored if path)


def mark_steps(trainer: Any, marks: Marks) -> dict[int, float]:
    """Note when training begins and when each step ends; returns the losses by step, filled in meanwhile."""
    from transformers import TrainerCallback

    losses: dict[int, float] = {}

    class Noting(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            marks("step 0")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            marks(f"step {state.global_step}")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                losses[state.global_step] = float(logs["loss"])

    trainer.add_callback(Noting())
    return losses


# --- the processes -----------------------------------------------------------------------------------------------


def run_side(
    workload: Workload, side: Side, state: str, options: argparse.Namespace, work: Path, checkpoint: Path
) -> dict[str, Any]:
    """One process's row, or one with `error`. `work` is the side's: its compile caches are in it."""
    if state == "first":
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
    if state == "warm":
        warm(checkpoint)
    else:
        evict(checkpoint)
    cached = cached_share(checkpoint)
    arguments = ["--workload", workload.name, "--side", side.name, "--checkpoint", str(checkpoint)]
    arguments += ["--steps", str(options.steps), "--started", str(time.time())]
    arguments += ["--notebook"] if options.notebook else []
    log = (options.logs or work) / f"{side.name}-{state}.log"
    status, output = run_module(
        "benchmarks.start", arguments, work=work, library=side.library, timeout=options.timeout, log=log
    )
    row = {"side": side.name, "state": state, "workload": workload.name, "cached": cached}
    return row | outcome(status, output, options.timeout)


def told(row: dict[str, Any]) -> str:
    """A row in a line."""
    name = f"{row['side']} {row['state']}"
    if "error" in row:
        return f"{name}: {row['error']}"
    stages = ", ".join(f"{stage} {row['stages'][stage]:.2f}" for stage in STAGES)
    held = "unknown" if row["cached"] is None else f"{row['cached']:.0%}"
    compiled = f"; {row['compiled']} modules compiled to bytecode" if row["compiled"] else ""
    return f"{name}: {row['total_s']:.2f} s ({stages}; {held} of the checkpoint in the page cache{compiled})"


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each side and state: medians over the rounds; failures below."""
    lines = []
    for side, state in dict.fromkeys((row["side"], row["state"]) for row in rows):
        alike = [r for r in rows if (r["side"], r["state"]) == (side, state) and "error" not in r]
        if not alike:
            lines.append([side, state, "failed", *[""] * (len(STAGES) + 1)])
            continue
        stages = [f"{median(r['stages'][stage] for r in alike):.2f}" for stage in STAGES]
        cached = [r["cached"] for r in alike if r["cached"] is not None]
        held = f"{median(cached):.0%}" if cached else "?"
        lines.append([side, state, f"{median(r['total_s'] for r in alike):.2f}", *stages, held])
    text = plain_table(("side", "state", "seconds", *STAGES, "cached"), lines)
    return "\n".join([text, *(told(row) for row in rows if "error" in row)])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of("start", __doc__)
    parser.add_argument("--workload", default="qwen1.5b-lora")
    parser.add_argument("--sides", help=f"default: {', '.join(DEFAULT_SIDES)}, those that are installed")
    parser.add_argument("--steps", type=int, default=4, help="trained in each process, two at least")
    parser.add_argument("--rounds", type=int, default=1, help="repeat all this often, interleaved")
    parser.add_argument(
        "--notebook",
        action="store_true",
        help="import the trainer's classes after the model, not at the beginning",
    )
    add_process_arguments(parser, 240.0, "process")
    parser.add_argument("--side", type=find_side, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.steps < 2:
        parser.error("--steps: two at least, for a later step to compare the first one with")
    settle(options)
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    workload = workload_of(options.workload, options.layers)
    if options.side is not None:
        row = measure(
            workload,
            options.side,
            options.checkpoint,
            steps=options.steps,
            started=options.started,
            notebook=options.notebook,
        )
        print(RESULT_PREFIX + json.dumps(row), flush=True)
        return 0
    if options.sides is None:
        sides = installed([find_side(name) for name in DEFAULT_SIDES])
    else:
        sides = [find_side(name) for name in options.sides.split(",")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        work = Path(folder)
        options.checkpoints = options.checkpoints or work / "checkpoints"
        checkpoint = checkpoint_folder(options, work, workload.model)
        for number in range(options.rounds):
            for side in sides:
                for state in STATES:
                    row = run_side(workload, side, state, options, work / side.name, checkpoint)
                    rows.append(row | {"round": number})
                    print(told(row), flush=True)
                    if options.json:
                        print(json.dumps(rows[-1]), flush=True)
    print(f"\n{table(rows)}", flush=True)
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
