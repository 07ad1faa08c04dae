"""Real runs, healthy ones and some with a fault planted into them, and what their curves are read as.

    python -m benchmarks.curves --model MODEL --out FOLDER [--only blocks,poisoned-row] [--workers 4] [--seed 7]

Each run leaves its report in FOLDER/NAME and its curves in FOLDER/NAME.json, which is what tests/tuning/curves/real
holds: steps, losses, gradient norms, evaluations, nothing else. Written for SmolLM2-135M-Instruct; the rows are those
of `benchmarks.lr_finder`. A seed decides which of them, in which order, and the adapter's beginning: one that the rules
have not been tuned with puts them to a trial. A run is red where a fault is not found, or anything else ends a run or
is blamed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.lr_finder import LENGTH, RANK, SEED, rows_of

STEPS = 240
BATCH = 8
#: the row that `poisoned-row` plants
POISONED = 17

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A run.

    Args:
        rows: what it trains on for a seed, of the rows there are.
        settings: of SFTConfig, where they differ from those of `train`.
        expected: kinds of findings, one of which has to be there; none for a healthy run.
        break_at: a step at which an adapter's weight becomes infinite.
    """

    rows: Callable[[int], Rows]
    settings: dict[str, Any] = field(default_factory=dict)
    expected: tuple[str, ...] = ()
    break_at: int | None = None


def some(name: str, seed: int, count: int | None = None) -> Rows:
    """Rows of a data set: the first of them for `SEED`, for another seed others, in another order."""
    rows = list(rows_of(name)[0])
    if seed != SEED:
        random.Random(seed).shuffle(rows)
    return rows[:count]


def with_answers(rows: Rows, answers: list[str]) -> Rows:
    """The chats with other answers."""
    return [
        {"messages": [row["messages"][0], {"role": "assistant", "content": answer}]}
        for row, answer in zip(rows, answers, strict=True)
    ]


def answers_of(rows: Rows) -> list[str]:
    return [row["messages"][1]["content"] for row in rows]


def of_others(rows: Rows) -> Rows:
    """Every row with the answer of another: labels that say nothing."""
    answers = answers_of(rows)
    return with_answers(rows, answers[1:] + answers[:1])


def poisoned(seed: int) -> Rows:
    """320 rows, the answer of one of which is words of all the others, drawn at random."""
    rows, draw = some("docstrings", seed, 320), random.Random(0)
    words = sorted({word for answer in answers_of(rows) for word in answer.split()})
    rows[POISONED] = with_answers([rows[POISONED]], [" ".join(draw.choices(words, k=100))])[0]
    return rows


def bad_end(seed: int) -> Rows:
    """Rows whose last third, of another file, say, has the words of its answers in no order."""
    rows, draw = some("docstrings", seed, STEPS * BATCH), random.Random(0)
    start = 2 * STEPS // 3 * BATCH
    mixed = [" ".join(draw.sample(words, len(words))) for words in map(str.split, answers_of(rows[start:]))]
    return rows[:start] + with_answers(rows[start:], mixed)


def in_blocks(seed: int, steps: int = 12) -> Rows:
    """Chats that come in blocks of one kind: so many steps of docstrings, then as many of functions.

    Kinds whose losses stay apart, 2.7 and 2: two that come to the same loss swing at first only.
    """
    functions = [
        {
            "messages": [
                {"role": "user", "content": "Write a function."},
                {"role": "assistant", "content": row["text"]},
            ]
        }
        for row in some("sources", seed)
    ]
    kinds = [some("docstrings", seed), functions]
    size, found = steps * BATCH, []
    for block in range(STEPS // steps):
        of, at = kinds[block % 2], block // 2 * size
        found += of[at : at + size]
    return found


IN_ORDER = {"train_sampling_strategy": "sequential"}
CASES = {
    "healthy-docstrings": Case(lambda seed: some("docstrings", seed)),
    "healthy-cosine": Case(
        lambda seed: some("sources", seed), {"lr_scheduler_type": "cosine", "learning_rate": 1e-3}
    ),
    "healthy-constant": Case(lambda seed: some("characters", seed), {"lr_scheduler_type": "constant"}),
    "healthy-single-rows": Case(
        lambda seed: some("docstrings", seed), {"per_device_train_batch_size": 1, "learning_rate": 2e-4}
    ),
    "healthy-accumulated": Case(
        lambda seed: some("docstrings", seed),
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    ),
    "rate-too-large": Case(
        lambda seed: some("docstrings", seed),
        {"learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0},
        ("rate-too-large", "divergence"),
    ),
    "rate-grows-too-large": Case(
        lambda seed: some("docstrings", seed),
        {"learning_rate": 0.2, "warmup_steps": STEPS},
        ("rate-too-large", "divergence"),
    ),
    "rate-too-small": Case(
        lambda seed: some("docstrings", seed), {"learning_rate": 1e-8}, ("rate-too-small",)
    ),
    "label-noise": Case(
        lambda seed: of_others(some("docstrings", seed, 240)), {"learning_rate": 1e-3}, ("overfitting",)
    ),
    "few-rows": Case(lambda seed: some("docstrings", seed, 48), {"learning_rate": 1e-3}, ("overfitting",)),
    "bad-end": Case(bad_end, {**IN_ORDER, "lr_scheduler_type": "constant"}, ("divergence", "rate-too-large")),
    "blocks": Case(in_blocks, {**IN_ORDER, "lr_scheduler_type": "constant"}, ("oscillation",)),
    "poisoned-row": Case(
        poisoned, {"per_device_train_batch_size": 4, "learning_rate": 2e-4}, ("spike", "spike-rows")
    ),
    "broken-weight": Case(lambda seed: some("docstrings", seed), {}, ("not-a-number",), break_at=160),
}


def train(model: str, case: Case, folder: Path, steps: int, seed: int) -> None:
    """Train with the case's rows and settings; the report is left in the folder."""
    from transformers import TrainerCallback

    from pronghorn import FastLanguageModel, SFTConfig, SFTTrainer

    class Breaks(TrainerCallback):
        def on_step_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            if state.global_step == case.break_at:
                next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("inf")

    base, tokenizer = FastLanguageModel.from_pretrained(model, max_seq_length=LENGTH, load_in_4bit=False)
    adapted = FastLanguageModel.get_peft_model(base, r=RANK, lora_alpha=2 * RANK, random_state=seed)
    rows = case.rows(seed)
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 6,
        "max_length": LENGTH,
        "assistant_only_loss": "messages" in rows[0],
        "eval_strategy": "steps",
        "eval_steps": max(steps // 8, 1),
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "report_samples": 1,
        "disable_tqdm": True,
        "seed": seed,
    }
    trainer = SFTTrainer(
        model=adapted,
        args=SFTConfig(**{**settings, **case.settings}),
        processing_class=tokenizer,
        train_dataset=rows,
        eval_dataset=rows_of("docstrings" if "messages" in rows[0] else "sources")[1],
        callbacks=[Breaks()] if case.break_at is not None else None,
    )
    trainer.train()


def curves_of(record: Any) -> dict[str, Any]:
    """Of a run's record what its curves are read from, as a JSON object that `load_run` takes."""
    keys = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss", "train_runtime", "train_loss")
    log = [{key: _digits(entry[key]) for key in keys if key in entry} for entry in record.log]
    return {
        "name": record.name,
        "state": record.state,
        "max_steps": record.max_steps,
        "settings": [asdict(item) for item in record.settings if item.name == "max_grad_norm"],
        "log": log,
        "steps": list(record.steps),
        "step_losses": [_digits(loss) for loss in record.step_losses],
        "step_norms": [_digits(norm) for norm in record.step_norms],
        "rows": record.rows,
    }


def _digits(value: Any) -> Any:
    """A number with five digits; JSON has none for what is none."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if value - value == 0 else None


def observe(model: str, name: str, out: Path, steps: int, seed: int) -> dict[str, Any]:
    """One run and the kinds that are found, with what is wrong about them."""
    from pronghorn.errors import NonFiniteLoss
    from pronghorn.tuning.curves import History, read_curves
    from pronghorn.tuning.run_record import load_run

    case, folder = CASES[name], out / name
    try:
        train(model, case, folder, steps, seed)
    except NonFiniteLoss as error:  # a run that ends so has a record, too
        print(f"{name} ended: {error.message}")
    record = load_run(folder)
    (out / f"{name}.json").write_text(json.dumps(curves_of(record)))
    found = read_curves(History.of_record(load_run(out / f"{name}.json")))
    return {"findings": [(finding.kind, finding.what) for finding in found], "wrong": verdict(case, found)}


def verdict(case: Case, found: list[Any]) -> str:
    """What of the findings is not as planted, or an empty text."""
    kinds = {finding.kind for finding in found}
    if not case.expected:
        return f"silence was expected, not {', '.join(sorted(kinds))}" if kinds else ""
    if not kinds & set(case.expected):
        return f"none of {', '.join(case.expected)}"
    blamed = {row for finding in found if finding.kind in ("spike", "spike-rows") for row in finding.rows}
    if "spike-rows" in case.expected and POISONED not in blamed:
        return f"row {POISONED} is not blamed"
    others = [f.kind for f in found if f.hopeless and f.kind not in case.expected]
    return f"also {', '.join(others)}" if others else ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED, help="of the rows, their order and the adapter")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        names = options.only.split(",")
        given = (options.out, options.steps, options.seed)
        runs = {name: pool.submit(observe, options.model, name, *given) for name in names}
        for name, run in runs.items():
            seen = run.result()
            print(f"{name}: {seen['wrong'] or 'as planted'}", flush=True)
            for kind, what in seen["findings"]:
                print(f"    {kind}: {what}", flush=True)


if __name__ == "__main__":
    main()
