"""Is the advised learning rate a good one? A fine grid of rates, each trained for the same budget, beside the advice.

    python -m benchmarks.lr_finder --model MODEL --out results.json [--steps 40] [--data docstrings] [--seeds 0,1,2]

Three data sets that every machine has: docstrings of Python's library (chats), its functions' sources (plain text),
names of Unicode characters (chats). Every cell of the grid trains the same new adapter on the same rows in the same
order, for `--steps` steps of a linear schedule, and is judged by the loss of held-back rows. A seed decides the
adapter's beginning and the order of the rows. `--workers` studies several data sets and seeds at the same time, in a
process each. What the output file holds already is not run again. The figures of docs/tuning.md are in
benchmarks/results/*-lr-finder.json.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import multiprocessing
import sysconfig
import time
import unicodedata
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Any

HELD_BACK = 48
ROWS = 4
LENGTH = 128
RANK = 16
SEED = 3407
#: of the best loss of the grid, how far above an advised rate may end
ALLOWED = 0.02
#: of a grid that says something
LEAST_RATES = 3
DATA_SETS = ("docstrings", "sources", "characters")


def grid(low: float, high: float, per_decade: int) -> list[float]:
    """Rates from `low` to `high`, `per_decade` to a factor of ten, to two digits."""
    count = round(math.log10(high / low) * per_decade)
    return [float(f"{low * 10 ** (i / per_decade):.2g}") for i in range(count + 1)]


@cache
def rows_of(name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows to train on, held-back rows) of a data set, in an order that depends on their text alone."""
    found = {"docstrings": _docstrings, "sources": _sources, "characters": _characters}[name]()
    shuffled = sorted(found, key=lambda row: hashlib.sha256(json.dumps(row).encode()).digest())
    return shuffled[HELD_BACK:], shuffled[:HELD_BACK]


def _docstrings() -> list[dict[str, Any]]:
    from pronghorn.data.docstrings import docstring_rows

    return [{"messages": row.messages()} for row in docstring_rows()]


def _sources() -> list[dict[str, Any]]:
    return [{"text": text} for text in dict.fromkeys(_functions()) if 120 <= len(text) <= 480]


def _functions() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        lines = text.split("\n")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))


def _characters() -> list[dict[str, Any]]:
    """Written systems below U+3000 that name their characters one by one."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is the name of the character {chr(code)} (U+{code:04X})?"},
                {"role": "assistant", "content": unicodedata.name(chr(code)).capitalize() + "."},
            ]
        }
        for code in range(0x21, 0x3000)
        if chr(code).isprintable() and unicodedata.name(chr(code), "")
    ]


class Bench:
    """One model with one adapter, put back to its beginning for every run."""

    def __init__(self, model: str, name: str, seed: int, steps: int, folder: Path) -> None:
        from pronghorn import FastLanguageModel

        loaded, self.tokenizer = FastLanguageModel.from_pretrained(
            model, max_seq_length=LENGTH, load_in_4bit=False
        )
        self.model = FastLanguageModel.get_peft_model(
            loaded, r=RANK, lora_alpha=2 * RANK, use_gradient_checkpointing=False, random_state=seed
        )
        train, held = rows_of(name)
        self.chats = "messages" in train[0]
        self.rows: tuple[Any, Any] = train[: 4 * ROWS * steps], held
        self.seed, self.steps, self.folder = seed, steps, folder
        self.start = {
            name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad
        }

    def trainer(self, rate: float) -> Any:
        """A trainer of the adapter as it was at first."""
        import torch

        from pronghorn import SFTConfig, SFTTrainer

        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                if key in self.start:
                    parameter.copy_(self.start[key])
                    parameter.grad = None
        settings = SFTConfig(
            output_dir=str(self.folder),
            max_steps=self.steps,
            per_device_train_batch_size=ROWS,
            per_device_eval_batch_size=ROWS,
            learning_rate=rate,
            lr_scheduler_type="linear",
            warmup_steps=2,
            max_length=LENGTH,
            assistant_only_loss=self.chats,
            pad_to_multiple_of=64,
            logging_steps=5,
            save_strategy="no",
            report=False,
            report_to="none",
            disable_tqdm=True,
            seed=self.seed,
        )
        train, held = self.rows
        trainer = SFTTrainer(
            model=self.model,
            args=settings,
            processing_class=self.tokenizer,
            train_dataset=train,
            eval_dataset=held,
        )
        self.rows = trainer.train_dataset, trainer.eval_dataset  # prepared once
        return trainer

    def run(self, rate: float) -> dict[str, Any]:
        """Train at a rate; the held-back loss and the training losses."""
        trainer = self.trainer(rate)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        losses = [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry]
        return {"held": trainer.evaluate()["eval_loss"], "train": losses, "seconds": round(seconds, 1)}

    def advise(self, steps: int) -> dict[str, Any]:
        """What the range test finds, before anything is trained."""
        from pronghorn.training.lr_finder import range_test

        return range_test(self.trainer(1e-4), steps=steps).as_dict()


def cell_name(name: str, seed: int) -> str:
    """How a file of results calls a data set at a seed."""
    return name if seed == SEED else f"{name}, seed {seed}"


def study(
    options: argparse.Namespace, name: str, seed: int, found: dict[str, Any], part: Path
) -> dict[str, Any]:
    """A data set at a seed: the advice, the run at the advised rate, the grid; written to `part` after each of them."""
    found = {"steps": options.steps, "test_steps": options.test_steps, "grid": {}, **found}
    rates = [
        rate
        for rate in grid(options.low, options.high, options.per_decade)
        if f"{rate:g}" not in found["grid"]
    ]
    if not rates and "at_advised" in found:
        return found
    bench = Bench(options.model, name, seed, options.steps, part.with_suffix(""))

    def keep(what: str, value: dict[str, Any]) -> None:
        part.write_text(json.dumps(found, indent=1))
        print(f"{cell_name(name, seed)}: {what}", json.dumps(value)[:160], flush=True)

    if "advised" not in found:
        found["advised"] = bench.advise(options.test_steps)
        keep("advised", found["advised"])
    if "at_advised" not in found:
        found["at_advised"] = bench.run(found["advised"]["learning_rate"])
        keep("at the advised rate", found["at_advised"])
    # The nearest first: where there is no time for all, the others say less.
    for rate in sorted(rates, key=lambda rate: abs(math.log(rate / found["advised"]["learning_rate"]))):
        found["grid"][f"{rate:g}"] = bench.run(rate)
        keep(f"{rate:g}", found["grid"][f"{rate:g}"])
    return found


def reading(found: dict[str, Any]) -> tuple[float, float]:
    """The rate that a test's curve is read to now, and its loss: measured, or where the curve was read otherwise then,
    on the line between the grid's neighbours."""
    from pronghorn.tuning.rates import changes_of, choose

    test, rate = found["advised"], found["advised"]["learning_rate"]
    if "rates" in test:
        losses = [math.nan if loss is None else loss for loss in test["losses"]]
        choice = choose(test["rates"], changes_of(losses, test["losses_before"]))
        if choice is not None and choice.rate != rate:
            return choice.rate, between(choice.rate, found["grid"])
    return rate, found["at_advised"]["held"]


def between(rate: float, runs: dict[str, Any]) -> float:
    """The loss at a rate, on the line between its neighbours in a grid (over the logarithm of the rate)."""
    losses = sorted((math.log(float(at)), run["held"]) for at, run in runs.items())
    for (low, first), (high, last) in pairwise(losses):
        if low <= math.log(rate) <= high:
            return float(first + (math.log(rate) - low) / (high - low) * (last - first))
    return math.nan


def table(cells: dict[str, Any]) -> str:
    """Markdown: the grid's best, the advised rate, how far its loss is from the best; of grids that say something."""
    lines = [
        "| data | grid: held-back loss by rate | best | range test advises | its loss | above the best |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in cells.items():
        runs = {float(rate): run["held"] for rate, run in found["grid"].items()}
        if len(runs) < LEAST_RATES:
            continue
        best = min(runs, key=runs.__getitem__)
        advised, loss = reading(found)
        shown = ", ".join(f"{rate:.2g}: {held:.3f}" for rate, held in sorted(runs.items()))
        above = loss / runs[best] - 1
        mark = "" if above <= ALLOWED else " (red)"
        lines.append(f"| {name} | {shown} | {best:.2g} | {advised:.2g} | {loss:.3f} | {above:+.1%}{mark} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lr_finder", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", default="outputs/lr_finder.json")
    parser.add_argument("--steps", type=int, default=40, help="the budget of every run")
    parser.add_argument("--test-steps", type=int, default=100, help="steps of the range test")
    parser.add_argument("--low", type=float, default=3.2e-4)
    parser.add_argument("--high", type=float, default=1e-2)
    parser.add_argument("--per-decade", type=int, default=4)
    parser.add_argument("--data", default=",".join(DATA_SETS))
    parser.add_argument("--seeds", default=str(SEED))
    parser.add_argument("--workers", type=int, default=1, help="processes, each with the model")
    options = parser.parse_args()
    out = Path(options.out)
    cells: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    parts = out.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        studies = {}
        for name in options.data.split(","):
            for seed in map(int, options.seeds.split(",")):
                cell = cell_name(name, seed)
                part = parts / f"{name}-{seed}.json"
                found = json.loads(part.read_text()) if part.exists() else cells.get(cell, {})
                studies[pool.submit(study, options, name, seed, found, part)] = cell
        for done in as_completed(studies):
            cells[studies[done]] = done.result()
            out.write_text(json.dumps(dict(sorted(cells.items())), indent=1))
    print(table(cells))


if __name__ == "__main__":
    main()
