"""Answers per second: Transformers, Unsloth and pronghorn, each through its own `generate` in a process of its own.

    python -m benchmarks.generate --model llama-3.1-8b --cases 1x512,32x512,64x1024 --out results/generate.csv
    python -m benchmarks.generate --model llama-3.1-8b --cases 1x512 --four-bit
    python -m benchmarks.generate --model qwen2.5-1.5b --cases 1x512 --adapter

A case is rows x prompt tokens. All sides load the same random weights, get the same prompts and answer greedily,
without an end. "decode" leaves out the time to the first token, which is that of an answer of one token; "agree" is the
share of the first tokens that equal Transformers': with random weights two logits may be as good as equal, and rounding
decides.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.libraries import TARGETS, import_library
from benchmarks.models import CONFIGS, FIRST_TOKEN
from benchmarks.run import checkpoint_folder, commit, failure_reason, roomy_folder, run_module
from benchmarks.side import RESULT_PREFIX, peak_memory, versions
from benchmarks.table import plain_table

SIDES = ("hf", "unsloth", "pronghorn")
#: new tokens that "agree" looks at: later ones follow from another beginning
AGREE_TOKENS = 4
FIELDS = (
    "date", "commit", "hardware", "model", "storage", "adapter", "side", "rows", "prompt", "new", "decode_per_s",
    "whole_per_s", "first_token_ms", "agree", "peak_allocated_gib", "loaded_s", "versions", "error",
)  # fmt: skip


def load(side: str, checkpoint: Path, length: int, four_bit: bool, adapter: bool) -> Any:
    """The checkpoint through the side's own loader, ready to answer."""
    import torch

    if side == "hf":
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quantised = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
            **({"device_map": {"": 0}} if torch.cuda.is_available() else {}),
            **({"quantization_config": quantised} if four_bit else {}),
        )
        return with_adapter(model).eval() if adapter else model.eval()
    if side == "unsloth":
        from unsloth import FastLanguageModel
    else:
        from pronghorn import FastLanguageModel
    model, _ = FastLanguageModel.from_pretrained(
        str(checkpoint), max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=four_bit
    )
    if adapter:
        model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, target_modules=TARGETS)
        fill_adapter(model)
    return FastLanguageModel.for_inference(model) or model


def with_adapter(model: Any) -> Any:
    """Stock PEFT's LoRA on all linear layers, unmerged."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS))
    fill_adapter(model)
    return model


def fill_adapter(model: Any) -> None:
    """Small numbers in B, the same on every side: zeros would leave the adapter's work without a trace."""
    import torch

    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)


def measure(model: Any, rows: int, prompt: int, new: int, repeats: int) -> dict[str, Any]:
    """One case's figures and the first tokens of its answers."""
    import torch

    device = next(model.parameters()).device
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(rows * 10_000 + prompt)

    def answer(count: int) -> tuple[float, Any]:
        # Other prompts each time: a side may keep what it has of a prompt it knows. The same ones on every side.
        ids = torch.randint(FIRST_TOKEN, vocabulary, (rows, prompt), generator=generator).to(device)
        _wait(device)
        begin = time.perf_counter()
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
            eos_token_id=None, pad_token_id=0, use_cache=True,
        )  # fmt: skip
        _wait(device)
        return time.perf_counter() - begin, out[:, prompt:]

    answer(min(new, 8))
    _, tokens = answer(new)
    whole = median(answer(new)[0] for _ in range(repeats))
    first = median(answer(1)[0] for _ in range(repeats))
    return {
        "rows": rows,
        "prompt": prompt,
        "new": new,
        "decode_per_s": rows * (new - 1) / max(whole - first, 1e-9),
        "whole_per_s": rows * new / whole,
        "first_token_ms": first * 1e3,
        "tokens": tokens[:, :AGREE_TOKENS].tolist(),
        "peak_allocated_gib": peak_memory()[0],
    }


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def run_here(options: argparse.Namespace) -> None:
    """One side in this process; prints a result line for each case."""
    started = time.time()
    import_library(options.side)
    import torch

    length = max(prompt for _, prompt in options.cases) + options.new
    model = load(options.side, options.checkpoint, length, options.four_bit, options.adapter)
    on_gpu = torch.cuda.is_available()
    shared = {
        "loaded_s": time.time() - started,
        "hardware": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "versions": versions(),
    }
    for rows, prompt in options.cases:
        with torch.inference_mode():
            result = measure(model, rows, prompt, options.new, options.repeats)
        print(RESULT_PREFIX + json.dumps({**shared, **result}), flush=True)


def run_side(side: str, options: argparse.Namespace, checkpoint: Path, work: Path) -> list[dict[str, Any]]:
    """A side's rows, with `error` in those of cases it did not finish."""
    cases = ",".join(f"{rows}x{prompt}" for rows, prompt in options.cases)
    arguments = ["--side", side, "--checkpoint", str(checkpoint), "--cases", cases, "--new", str(options.new)]
    arguments += ["--repeats", str(options.repeats), "--model", options.model]
    arguments += [f"--{name.replace('_', '-')}" for name in ("four_bit", "adapter") if getattr(options, name)]
    status, output = run_module(
        "benchmarks.generate", arguments, work=work, library=side, timeout=options.timeout
    )
    lines = [line for line in output.splitlines() if line.startswith(RESULT_PREFIX)]
    found = [json.loads(line.removeprefix(RESULT_PREFIX)) for line in lines]
    missing = [
        {
            "rows": rows,
            "prompt": prompt,
            "new": options.new,
            "error": failure_reason(status, output, options.timeout),
        }
        for rows, prompt in options.cases[len(found) :]
    ]
    shared = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "model": options.model,
        "storage": "nf4" if options.four_bit else "bf16",
        "adapter": "unmerged r=16" if options.adapter else "",
        "side": side,
    }
    return [{**shared, **row} for row in (*found, *missing)]


def compare(results: list[dict[str, Any]]) -> None:
    """Fill in `agree`: each side's first tokens against Transformers' of the same case."""
    stock = {(r["rows"], r["prompt"]): r["tokens"] for r in results if r["side"] == "hf" and "tokens" in r}
    for result in results:
        expected = stock.get((result["rows"], result["prompt"]))
        if expected is None or "tokens" not in result:
            continue
        pairs = [
            (ours, theirs)
            for row, other in zip(result["tokens"], expected, strict=True)
            for ours, theirs in zip(row, other, strict=True)
        ]
        result["agree"] = sum(ours == theirs for ours, theirs in pairs) / len(pairs)


def report(results: list[dict[str, Any]]) -> str:
    """A table in plain text; ratios are to Transformers, by tokens of whole answers."""
    stock = {(r["rows"], r["prompt"]): r.get("whole_per_s") for r in results if r["side"] == "hf"}
    lines = []
    for r in sorted(results, key=lambda r: (r["rows"], r["prompt"], SIDES.index(r["side"]))):
        if "error" in r:
            lines.append([f"{r['rows']} x {r['prompt']}", r["side"], *[""] * 6, r["error"]])
            continue
        base = stock.get((r["rows"], r["prompt"]))
        lines.append(
            [
                f"{r['rows']} x {r['prompt']}",
                r["side"],
                f"{r['decode_per_s']:,.0f}",
                f"{r['whole_per_s']:,.0f}",
                f"{r['whole_per_s'] / base:.2f}x" if base else "",
                f"{r['first_token_ms']:.1f}",
                f"{r['agree']:.0%}" if "agree" in r else "",
                f"{r['peak_allocated_gib']:.1f}",
                "",
            ]
        )
    header = ("case", "side", "decode tok/s", "whole tok/s", "to hf", "first ms", "agree", "GiB", "error")
    return plain_table(header, lines)


def append_csv(path: Path, results: list[dict[str, Any]]) -> None:
    """Append rows; the header is written to a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        for result in results:
            versions = " ".join(f"{name}={v}" for name, v in result.get("versions", {}).items())
            writer.writerow({**result, "versions": versions})


def cases_of(text: str) -> list[tuple[int, int]]:
    """ "1x512,32x1024" -> [(1, 512), (32, 1024)]."""
    return [(int(rows), int(prompt)) for rows, prompt in (case.split("x") for case in text.split(","))]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=sorted(CONFIGS), default="qwen2.5-1.5b")
    parser.add_argument("--sides", default=",".join(SIDES), help="of " + ", ".join(SIDES))
    parser.add_argument(
        "--cases", type=cases_of, default="1x512", help="rows x prompt tokens, such as 1x512,32x512"
    )
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--four-bit", action="store_true", help="NF4 weights, double quantised")
    parser.add_argument(
        "--adapter", action="store_true", help="an unmerged LoRA adapter of rank 16 on all layers"
    )
    parser.add_argument("--checkpoints", type=Path, help="a folder to keep the checkpoints in")
    parser.add_argument("--out", type=Path, help="a CSV file to append to")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.side:
        run_here(options)
        return 0
    with TemporaryDirectory(prefix="generate-", dir=roomy_folder()) as folder:
        work = Path(folder)
        options.checkpoints = options.checkpoints or work
        checkpoint = checkpoint_folder(options, work, options.model)
        results: list[dict[str, Any]] = []
        for side in options.sides.split(","):
            results += run_side(side, options, checkpoint, work)
    compare(results)
    print(report(results))
    if options.out:
        append_csv(options.out, results)
    return 1 if any("error" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
