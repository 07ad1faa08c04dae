"""One row's decoding with and without the walking kernel (`kernels/walk.py`), by merged and unmerged adapters.

    python -m benchmarks.walk --model llama-3.1-8b --layers 8 --prompt 512 --new 128

The walk takes all products between two attentions in one launch, on compute capability 9.0, for one row of plain layers
in bf16, with adapters or without. Otherwise every product is a launch. Each line is a process of its own, which answers
the same prompt greedily; tokens and log-probabilities of the two ways are compared up to the first token that differs.
With random weights two tokens may be as good as equally likely: "apart" is by how much the two likeliest ones are at
that place.

Where no walk is found, the line without it would be the same one and is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.command import add_process_arguments, outcome, parser_of, settle
from benchmarks.generate import fill_adapter
from benchmarks.libraries import TARGETS
from benchmarks.models import CONFIGS, FIRST_TOKEN, find_model, with_layers
from benchmarks.run import checkpoint_folder, roomy_folder, run_module
from benchmarks.side import RESULT_PREFIX, peak_memory, versions
from benchmarks.table import plain_table

ADAPTERS = ("merged", "unmerged")
WAYS = ("walk", "launches")


def load(checkpoint: Path, length: int, adapter: str) -> Any:
    """The checkpoint in bf16 with an adapter of rank 16 on all layers, or with it merged."""
    import torch

    from pronghorn import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(checkpoint), max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, target_modules=TARGETS)
    fill_adapter(model)
    model = model.merge_and_unload() if adapter == "merged" else model
    return model.requires_grad_(False).eval()


def engine_of(model: Any, context: int, way: str) -> tuple[Any, int | None]:
    """An engine for one row, and how many walks a step of it has; None where steps are not recorded."""
    from pronghorn.inference.captured import CapturedRunner
    from pronghorn.inference.engine import Engine

    engine = Engine(model, max_batch=1, max_context=context)
    runner = engine._runner
    if not isinstance(runner, CapturedRunner):
        return engine, None
    if way == "launches":
        runner.recover()  # what is done where a walk fails
    return engine, len(runner.fused.walks)


def answer(engine: Any, prompt: tuple[int, ...], new: int, logprobs: int | None) -> tuple[list[Any], float]:
    """The answer's tokens, and the seconds from the first one to the last."""
    from pronghorn.inference.requests import Request, SamplingParams

    sampling = SamplingParams(max_new_tokens=new, logprobs=logprobs)
    engine.submit(Request(prompt, sampling, engine.active_adapter))
    tokens: list[Any] = []
    began = ended = 0.0
    while engine.has_work:
        found = [token for event in engine.step() for token in event.tokens]
        if found:
            ended = time.perf_counter()
            began = began or ended
            tokens += found
    return tokens, ended - began


def measure(
    checkpoint: Path, *, adapter: str, way: str, prompt: int, new: int, repeats: int
) -> dict[str, Any]:
    """One way's speed, tokens and log-probabilities, in this process."""
    import torch

    began = time.perf_counter()
    model = load(checkpoint, prompt + new, adapter)
    loaded = time.perf_counter() - began
    engine, walks = engine_of(model, prompt + new, way)
    generator = torch.Generator().manual_seed(prompt)
    ids = torch.randint(FIRST_TOKEN, model.config.vocab_size, (prompt,), generator=generator)
    given = tuple(ids.tolist())
    answer(engine, given, min(new, 8), None)  # kernels are compiled, a step is recorded
    seconds = [answer(engine, given, new, None)[1] for _ in range(repeats)]
    tokens, _ = answer(engine, given, new, 2)
    on_gpu = torch.cuda.is_available()
    return {
        "walks": walks,
        "decode_per_s": (new - 1) / median(seconds),
        "decode_per_s_all": [(new - 1) / one for one in seconds],
        "tokens": [token.id for token in tokens],
        "logprobs": [token.logprob for token in tokens],
        "apart": [token.top[0][1] - token.top[1][1] for token in tokens],
        "peak_allocated_gib": peak_memory()[0],
        "loaded_s": loaded,
        "hardware": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "versions": versions(),
    }


def compare(walked: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How far two answers to one prompt are the same: `alike` tokens from the first on, of `new`; the largest
    difference of their log-probabilities; how far `apart` the likeliest two are where the answers part, None where they
    do not."""
    pairs = list(zip(walked["tokens"], other["tokens"], strict=True))
    alike = next((index for index, (one, two) in enumerate(pairs) if one != two), len(pairs))
    differences = [
        abs(one - two) for one, two in zip(walked["logprobs"][:alike], other["logprobs"][:alike], strict=True)
    ]
    apart = None if alike == len(pairs) else other["apart"][alike]
    return {
        "alike": alike,
        "new": len(pairs),
        "logprobs_differ": max(differences, default=None),
        "apart": apart,
    }


# --- the processes -----------------------------------------------------------------------------------------------


def run_way(
    adapter: str, way: str, options: argparse.Namespace, work: Path, checkpoint: Path
) -> dict[str, Any]:
    """One process's row, or one with `error`."""
    arguments = [
        "--model",
        options.model,
        "--checkpoint",
        str(checkpoint),
        "--adapter",
        adapter,
        "--way",
        way,
    ]
    for name in ("prompt", "new", "repeats"):
        arguments += [f"--{name}", str(getattr(options, name))]
    status, output = run_module(
        "benchmarks.walk",
        arguments,
        work=work,
        library="pronghorn",
        timeout=options.timeout,
        log=(options.logs or work) / f"walk-{adapter}-{way}.log",
    )
    row = {"model": options.model, "adapter": adapter, "way": way}
    return row | outcome(status, output, options.timeout)


def run_all(options: argparse.Namespace, work: Path, checkpoint: Path) -> list[dict[str, Any]]:
    """Both ways of both kinds of adapter; each is printed as it ends, and beside its other way."""
    rows: list[dict[str, Any]] = []
    for adapter in options.adapters.split(","):
        walked = run_way(adapter, "walk", options, work, checkpoint)
        found = [walked]
        print(told(walked), flush=True)
        if walked.get("walks") or "error" in walked:
            other = run_way(adapter, "launches", options, work, checkpoint)
            found.append(other)
            if not any("error" in row for row in found):
                walked |= compare(walked, other)
            print(told(other), flush=True)
        if options.json:
            print("\n".join(json.dumps(row) for row in found), flush=True)
        rows += found
    return rows


def told(row: dict[str, Any]) -> str:
    """A row in a line."""
    name = f"{row['adapter']}, {row['way']}"
    if "error" in row:
        return f"{name}: {row['error']}"
    walks = "steps are not recorded" if row["walks"] is None else f"{row['walks']} walks a step"
    speeds = ", ".join(f"{speed:.1f}" for speed in row["decode_per_s_all"])
    return f"{name}: {row['decode_per_s']:.1f} tokens/s ({speeds}; {walks})"


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each process; a walk's has what it is compared to the launches by."""
    launches = {row["adapter"]: row for row in rows if row["way"] == "launches" and "error" not in row}
    lines = []
    for row in rows:
        if "error" in row:
            lines.append([f"{row['adapter']}, {row['way']}", "failed", *[""] * 5])
            continue
        base = launches.get(row["adapter"])
        compared = base is not None and "alike" in row
        differ = row.get("logprobs_differ")
        lines.append(
            [
                f"{row['adapter']}, {row['way']}",
                "" if row["walks"] is None else str(row["walks"]),
                f"{row['decode_per_s']:.1f}",
                f"{row['decode_per_s'] / base['decode_per_s']:.2f}x" if compared and base else "",
                f"{row['alike']} of {row['new']}" if compared else "",
                "" if differ is None else f"{differ:.1e}",
                f"{row['apart']:.1e}" if compared and row["apart"] is not None else "",
            ]
        )
    header = ("adapter, way", "walks", "decode tok/s", "vs launches", "same tokens", "log-prob", "apart")
    failed = [told(row) for row in rows if "error" in row]
    without = [
        f"{row['adapter']}: no walk is found: a walk takes plain layers in bf16, with adapters of rank 32 at most"
        for row in rows
        if row["way"] == "walk" and row.get("walks", 1) in (0, None)
    ]
    return "\n".join([plain_table(header, lines), *failed, *without])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of("walk", __doc__)
    parser.add_argument("--model", type=find_model, default="qwen2.5-1.5b", help=f"of {', '.join(CONFIGS)}")
    parser.add_argument("--adapters", default=",".join(ADAPTERS), help=f"of {', '.join(ADAPTERS)}")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of the answer, two at least")
    parser.add_argument("--repeats", type=int, default=3, help="answers that are timed")
    add_process_arguments(parser, 240.0, "process")
    parser.add_argument("--adapter", choices=ADAPTERS, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.new < 2 or min(options.prompt, options.repeats) < 1:
        parser.error("--new: two at least; --prompt and --repeats: one")
    unknown = set(options.adapters.split(",")) - {*ADAPTERS}
    if unknown:
        parser.error(f"--adapters: of {', '.join(ADAPTERS)}")
    settle(options)
    return options


def is_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.way is not None:
        row = measure(
            options.checkpoint, adapter=options.adapter, way=options.way, prompt=options.prompt, new=options.new,
            repeats=options.repeats,
        )  # fmt: skip
        print(RESULT_PREFIX + json.dumps(row), flush=True)
        return 0
    if not is_gpu():
        print("there is no GPU here: the walk is a kernel for compute capability 9.0; nothing is measured")
        return 0
    if options.layers:
        options.model = with_layers(options.model, options.layers)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=roomy_folder()) as folder:
        work = Path(folder)
        options.checkpoints = options.checkpoints or work / "checkpoints"
        checkpoint = checkpoint_folder(options, work, options.model)
        rows = run_all(options, work, checkpoint)
    print(f"\n{table(rows)}", flush=True)
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
