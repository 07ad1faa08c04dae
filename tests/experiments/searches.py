"""A small search for tests; apart from them, so that worker processes can import it."""

from __future__ import annotations

import os
import signal
import time
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


class OnlyHere:
    """What a process can hand to no other: it is unpickled in the one that pickled it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _only_in, (os.getpid(),)


def _only_in(process: int) -> OnlyHere:
    if os.getpid() != process:
        raise RuntimeError("no peer access")
    return OnlyHere()


#: one for every base that this process has loaded itself
_loads: list[bool] = []


def load_and_note() -> tuple[Any, Any]:
    _loads.append(True)
    return load()


def first_killed(folder: Path, model: Any, tokenizer: Any, rows: Any) -> float:
    """A metric that kills the worker that loaded the base while another is at a trial. Writes down each process, and
    the file that its weights are in."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    files = {line.split()[4] for line in maps if "memfd:pronghorn-base" in line}
    with (folder / "where").open("a") as lines:
        lines.write(f"{os.getpid()} {len(_loads)} {','.join(files)}\n")
    if not (folder / "killed").exists():
        if _loads:
            _wait_for(folder / "other")
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / "other").touch()
        _wait_for(folder / "never")  # this process is ended meanwhile
    return 1.0


def _wait_for(file: Path, seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < until, f"{file.name} does not come"
        time.sleep(0.02)


def outcome(trial: Trial) -> dict[str, Any]:
    """What of a trial is the same every time."""
    return {
        name: value
        for name, value in trial.as_dict().items()
        if name not in ("seconds", "memory", "tokens_per_second")
    }
