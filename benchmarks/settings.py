"""What the settings of a run do: short trainings of the quickstart's real model on a CPU, for docs/settings.md.

    python -m benchmarks.settings                       # measure what is missing, then write the tables
    python -m benchmarks.settings --tables rank         # one table only
    python -m benchmarks.settings --only-write          # write the tables from the results that are there

Every cell trains a new adapter of SmolLM2-135M-Instruct on docstrings of Python's library, the same rows in the same
order, and is judged by the loss of the same held-back rows at full length. Time is the process's own CPU time on
one thread, so that it does not depend on what else the machine does. A cell that the results hold is not run again; a
table that has not all of its cells is left out of the pages.
"""

from __future__ import annotations

import argparse
import csv
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "settings-cpu.csv"
PAGES = {"en": ROOT / "docs" / "settings.md", "zh": ROOT / "docs" / "zh" / "settings.md"}
SEED = 3407
HELD_BACK = 32
#: rows are judged at this length, whatever they were trained at
FULL_LENGTH = 256
FIELDS = (
    "table", "cell", "steps", "tokens", "loss_first", "held_before", "held_after", "cpu_seconds", "trained_parameters",
    "rows_cut", "date", "machine", "torch", "transformers", "dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One training: `name` is the setting that its table varies. `steps` None is one pass over `rows` rows."""

    name: str
    learning_rate: float = 1e-3
    rows_per_batch: int = 4
    accumulation: int = 1
    max_length: int = 128
    rank: int = 16
    packing: bool = False
    steps: int | None = 20
    rows: int | None = None


TABLES: dict[str, tuple[Cell, ...]] = {
    "learning-rate": tuple(Cell(f"{rate:.0e}", learning_rate=rate) for rate in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)),
    "batch": tuple(
        Cell(f"{rows} × {8 // rows}", rows_per_batch=rows, accumulation=8 // rows, steps=8) for rows in (8, 4, 1)
    ),
    "length": tuple(Cell(str(length), max_length=length) for length in (48, 64, 128)),
    "rank": tuple(Cell(str(rank), rank=rank) for rank in (2, 16, 128)),
    "packing": (
        Cell("off, 8 rows a step", rows_per_batch=8, max_length=FULL_LENGTH, steps=None, rows=96),
        Cell("on, 3 × 256 tokens a step", rows_per_batch=3, max_length=FULL_LENGTH, packing=True, steps=None, rows=96),
    ),
}  # fmt: skip

#: columns of the Markdown tables: field, and its name in each language
COLUMNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "learning-rate": (
        ("cell", "`learning_rate`", "`learning_rate`"),
        ("held_after", "held-back loss", "留出损失"),
    ),
    "batch": (
        ("cell", "rows × accumulation", "每批行数 × 累积"),
        ("loss_first", "loss of the first step", "第一步的损失"),
        ("held_after", "held-back loss", "留出损失"),
        ("cpu_seconds", "CPU seconds", "CPU 秒"),
    ),
    "packing": (
        ("cell", "`packing`", "`packing`"),
        ("steps", "steps", "步数"),
        ("tokens", "tokens", "token 数"),
        ("held_after", "held-back loss", "留出损失"),
        ("cpu_seconds", "CPU seconds", "CPU 秒"),
    ),
    "length": (
        ("cell", "`max_length`", "`max_length`"),
        ("rows_cut", "rows cut off", "被截断的行"),
        ("tokens", "tokens", "token 数"),
        ("held_after", "held-back loss", "留出损失"),
        ("cpu_seconds", "CPU seconds", "CPU 秒"),
    ),
    "rank": (
        ("cell", "`r`", "`r`"),
        ("trained_parameters", "trained parameters", "训练的参数"),
        ("held_after", "held-back loss", "留出损失"),
    ),
}


class Bench:
    """The model with an adapter of one rank, put back to its beginning before every cell."""

    def __init__(self, rank: int, folder: Path) -> None:
        from pronghorn import FastLanguageModel
        from pronghorn.cli.models import find_quickstart_model
        from pronghorn.data.docstrings import docstring_rows, split_rows

        model, self.tokenizer = FastLanguageModel.from_pretrained(
            str(find_quickstart_model()), max_seq_length=FULL_LENGTH, load_in_4bit=False
        )
        self.model = FastLanguageModel.get_peft_model(
            model, r=rank, lora_alpha=2 * rank, use_gradient_checkpointing=False, random_state=SEED
        )
        self.rank, self.folder = rank, folder
        self.start = {
            name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad
        }
        train, held = split_rows(docstring_rows(), HELD_BACK)
        self.train = [{"messages": row.messages()} for row in train]
        self.held = [{"messages": row.messages()} for row in held]
        self.held_before = self.held_loss()

    def begin(self) -> None:
        """Puts the adapter back."""
        import torch

        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self.start:
                    parameter.copy_(self.start[name])
                    parameter.grad = None

    def trainer(self, rows: list[dict[str, Any]], **settings: Any) -> Any:
        from datasets import Dataset

        from pronghorn import SFTConfig, SFTTrainer

        fixed: dict[str, Any] = {
            "output_dir": str(self.folder),
            "per_device_eval_batch_size": 4,
            "assistant_only_loss": True,
            "drop_unsupervised_rows": True,
            "lr_scheduler_type": "linear",
            "warmup_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report": False,
            "report_to": "none",
            "disable_tqdm": True,
            "seed": SEED,
        }
        return SFTTrainer(
            model=self.model,
            args=SFTConfig(**fixed, **settings),
            processing_class=self.tokenizer,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(self.held),
        )

    def held_loss(self) -> float:
        """Mean cross-entropy a supervised token of the held-back rows at full length."""
        return float(self.trainer(self.held, max_length=FULL_LENGTH).evaluate()["eval_loss"])

    def run(self, cell: Cell) -> dict[str, Any]:
        """Trains the cell and gives its row of the results, without machine and versions."""
        self.begin()
        rows = self.train[: cell.rows or cell.rows_per_batch * cell.accumulation * (cell.steps or 1)]
        trainer = self.trainer(
            rows,
            max_length=cell.max_length,
            max_steps=cell.steps or -1,
            num_train_epochs=1,
            per_device_train_batch_size=cell.rows_per_batch,
            gradient_accumulation_steps=cell.accumulation,
            learning_rate=cell.learning_rate,
            packing=cell.packing,
        )
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {
            "steps": trainer.state.global_step,
            "tokens": int(max(entry.get("num_tokens", 0) for entry in trainer.state.log_history)),
            "loss_first": round(losses[0], 4),
            "held_before": round(self.held_before, 4),
            "held_after": round(self.held_loss(), 4),
            "cpu_seconds": round(seconds, 1),
            "trained_parameters": sum(tensor.numel() for tensor in self.start.values()),
            "rows_cut": f"{sum(self.length(row) > cell.max_length for row in rows)} of {len(rows)}",
        }

    def length(self, row: dict[str, Any]) -> int:
        ids = self.tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
        return len(ids)


def measure(tables: Iterable[str], results: Path) -> None:
    """Runs the cells that `results` has not yet, and adds a row for each as it ends."""
    import torch

    torch.set_num_threads(1)
    have = {(row["table"], row["cell"]): row for row in read(results)}
    cells = [(table, cell) for table in tables for cell in TABLES[table] if (table, cell.name) not in have]
    bench: Bench | None = None
    with tempfile.TemporaryDirectory() as folder:
        for table, cell in cells:
            row: dict[str, Any] | None = same_run(cell, have)
            if row is None:
                if bench is None or bench.rank != cell.rank:
                    bench = Bench(cell.rank, Path(folder))
                row = {**bench.run(cell), **where(bench.model)}
            row |= {"table": table, "cell": cell.name}
            have[table, cell.name] = row
            add(results, row)
            print(
                f"{table:14s} {cell.name:26s} held-back {row['held_after']} ({row['cpu_seconds']} s)",
                flush=True,
            )


def same_run(cell: Cell, have: Mapping[tuple[str, str], dict[str, Any]]) -> dict[str, Any] | None:
    """The row of a cell of any table that is the same training, if one was measured."""
    for table, cells in TABLES.items():
        for other in cells:
            if replace(other, name=cell.name) == cell and (table, other.name) in have:
                return dict(have[table, other.name])
    return None


def where(model: Any) -> dict[str, str]:
    """On what it ran."""
    import torch
    import transformers

    from pronghorn.hardware import probe

    return {
        "date": date.today().isoformat(),
        "machine": f"{probe().name}, 1 thread",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def read(results: Path) -> list[dict[str, str]]:
    if not results.exists():
        return []
    with results.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add(results: Path, row: dict[str, Any]) -> None:
    new = not results.exists()
    with results.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def table_of(name: str, rows: list[dict[str, str]], language: str) -> str | None:
    """The table in Markdown, with a line on what it ran; None unless every cell of it was measured."""
    by_cell = {row["cell"]: row for row in rows if row["table"] == name}
    found = [by_cell[cell.name] for cell in TABLES[name] if cell.name in by_cell]
    if len(found) < len(TABLES[name]):
        return None
    of_language = 1 if language == "en" else 2
    columns = COLUMNS[name]
    lines = [
        "| " + " | ".join(column[of_language] for column in columns) + " |",
        "| --- " * len(columns) + "|",
    ]
    for row in found:
        lines.append(
            "| " + " | ".join(shown(row[column[0]], column[0], language) for column in columns) + " |"
        )
    first = found[0]
    versions = f"torch {first['torch']}, Transformers {first['transformers']}"
    facts = f"{first['machine']}, {first['dtype']}, {versions}, {first['date']}"
    if language == "en":
        note = f"Held-back loss before training: {float(first['held_before']):.3f}. Ran on: {facts}."
    else:
        note = f"训练前的留出损失：{float(first['held_before']):.3f}。运行环境：{facts.replace('1 thread', '单线程')}。"
    return "\n".join([*lines, "", note])


def shown(value: str, field: str, language: str) -> str:
    if field in ("tokens", "trained_parameters"):
        return f"{int(value):,}"
    if field in ("held_after", "loss_first"):
        return f"{float(value):.3f}"
    if field == "cpu_seconds":
        return f"{float(value):.0f}"
    if language == "zh":
        for english, chinese in ((" rows a step", " 行每步"), (" tokens a step", " token 每步"), (" of ", " / "),
                                 ("off, ", "关，"), ("on, ", "开，")):  # fmt: skip
            value = value.replace(english, chinese)
    return value


def write(page: Path, rows: list[dict[str, str]], language: str) -> list[str]:
    """Puts every complete table between its marks in the page; the names of those that are there now."""
    text, written = page.read_text(encoding="utf-8"), []
    for name in TABLES:
        table = table_of(name, rows, language)
        marks = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end of table -->)", re.DOTALL)
        if table is None or not marks.search(text):
            continue
        text = marks.sub(lambda found, table=table: f"{found[1]}\n{table}\n\n{found[2]}", text)
        written.append(name)
    page.write_text(text, encoding="utf-8")
    return written


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", default=",".join(TABLES), help="names between commas")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only-write", action="store_true", help="train nothing")
    options = parser.parse_args(argv)
    unknown = set(options.tables.split(",")) - set(TABLES)
    if unknown:
        parser.error(f"unknown tables: {', '.join(sorted(unknown))} (there are {', '.join(TABLES)})")
    if not options.only_write:
        measure(options.tables.split(","), options.results)
    for language, page in PAGES.items():
        if page.exists():
            print(
                f"{page.relative_to(ROOT)}: {', '.join(write(page, read(options.results), language)) or 'no table'}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
