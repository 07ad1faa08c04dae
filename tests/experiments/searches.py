"""A small search for tests; apart from them, so that worker processes can import it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from datasets import Dataset

from pronghorn.experiments.search import Task, Trial
from pronghorn.training import SFTConfig
from tests.tiny import tiny_model, tiny_tokenizer

SPACE = {"learning_rate": [1e-3, 1e-2], "r": [2, 4]}


def load(seed: int = 0) -> tuple[Any, Any]:
    return tiny_model("llama", seed=seed), tiny_tokenizer()


def rows_of(count: int) -> Dataset:
    answers = ("seven", "green", "north")
    return Dataset.from_list(
        [{"prompt": f"How many {n}? ", "completion": answers[n % 3]} for n in range(count)]
    )


def task(rows: int = 12, steps: int = 3, **options: Any) -> Task:
    settings = SFTConfig(
        max_steps=steps, per_device_train_batch_size=4, report_to="none", seed=1, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    given = {"load": load, "adapter": {"target_modules": ["q_proj", "v_proj"]}, **options}
    return Task(rows=rows_of(rows), held_out=rows_of(4), settings=settings, **given)


def killed_once(flag: Path, model: Any, tokenizer: Any, rows: Any) -> float:
    """A metric whose first caller is killed."""
    try:
        flag.touch(exist_ok=False)
    except FileExistsError:
        return 1.0
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


def outcome(trial: Trial) -> dict[str, Any]:
    """What of a trial is the same every time."""
    return {
        name: value
        for name, value in trial.as_dict().items()
        if name not in ("seconds", "memory", "tokens_per_second")
    }
