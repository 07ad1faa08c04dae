"""What a run leaves about itself in `run.json`: everything that its report, a comparison and a later reading need."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pronghorn.errors import RunUnreadable
from pronghorn.pages import write_whole

RECORD = "run.json"
#: of a run whose record lacks, or that another trainer made
TRAINER_STATE = "trainer_state.json"
_VERSION = 1

Source = Literal["default", "given", "planned"]


@dataclass(frozen=True)
class Setting:
    """One setting of a run.

    Args:
        source: the library's default, the user's, or worked out from model, data and machine.
        note: what it was before it was worked out.
    """

    name: str
    value: Any
    source: Source
    note: str = ""

    @property
    def text(self) -> str:
        """The value as it would be written."""
        if isinstance(self.value, float):
            return f"{self.value:g}"
        return (
            self.value
            if isinstance(self.value, str)
            else json.dumps(self.value, ensure_ascii=False, default=str)
        )


@dataclass(frozen=True)
class Sample:
    """A prompt's answers by the model before and after training, beside the data's own."""

    prompt: str
    expected: str
    before: str
    after: str


@dataclass
class RunRecord:
    """One training run.

    Args:
        state: "running", "finished", "stopped early: …", "stopped" (by a callback), "interrupted" or "failed: …".
        log: Transformers' `log_history`.
        step_losses, step_norms: of each optimizer step of `steps`, where the trainer knew them.
        memory: (step, bytes now, most bytes so far), of what `memory_of` says.
        planned_memory: the bytes that the memory plan expected, where there is one for this machine.
        findings: what reading the curves found, as `Finding.as_dict` gives it.
        rows: by step, the rows of the data as given that a finding asks about.
    """

    name: str = ""
    state: str = "running"
    began: str = ""
    seconds: float = 0.0
    max_steps: int = 0
    settings: list[Setting] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    step_losses: list[float] = field(default_factory=list)
    step_norms: list[float] = field(default_factory=list)
    memory: list[tuple[int, int, int]] = field(default_factory=list)
    memory_of: str = ""
    planned_memory: int | None = None
    findings: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[int, list[int]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def curve(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a key of the log."""
        return [(entry["step"], entry[key]) for entry in self.log if key in entry and "step" in entry]

    def losses(self) -> list[tuple[float, float]]:
        """(step, loss): of every step where they are known, else the averages that were logged."""
        if self.steps:
            return list(zip(map(float, self.steps), self.step_losses, strict=True))
        return self.curve("loss")

    def norms(self) -> list[tuple[float, float]]:
        """(step, gradient norm) before clipping, likewise."""
        if any(map(math.isfinite, self.step_norms)):
            return list(zip(map(float, self.steps), self.step_norms, strict=True))
        return self.curve("grad_norm")

    def evaluations(self) -> list[str]:
        """Keys of the log that are losses on held-out rows."""
        return evaluation_keys(self.log)

    def last(self, key: str) -> float | None:
        """The last logged value of a key."""
        points = self.curve(key)
        return points[-1][1] if points else None

    def setting(self, name: str) -> Any:
        """A setting's value, None where the record has none of that name."""
        return next((item.value for item in self.settings if item.name == name), None)

    def save(self, folder: Path) -> Path:
        """Write `run.json`, whole or not at all. Numbers that JSON lacks become null.

        Raises:
            OSError: it cannot be written.
        """
        path = folder / RECORD
        plain = {"version": _VERSION, **dataclasses.asdict(self)}
        write_whole(json.dumps(_finite(plain), ensure_ascii=True, allow_nan=False, default=str), path)
        return path


def evaluation_keys(log: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys of a log that are losses on held-out rows."""
    return sorted(
        {key for entry in log for key in entry if key.startswith("eval_") and key.endswith("_loss")}
    )


def load_run(place: str | os.PathLike[str]) -> RunRecord:
    """A run from its output folder, its `run.json`, or any trainer's `trainer_state.json`.

    Raises:
        RunUnreadable: nothing of a run is there, or it is no such file.
    """
    path = Path(place).expanduser()
    found = _find(path)
    if found is None:
        raise RunUnreadable(
            f"there is neither {RECORD} nor {TRAINER_STATE}",
            where=str(place),
            fix="name the output_dir of a run that has logged or saved something",
        )
    try:
        content = json.loads(found.read_text(encoding="utf-8"))
        name = _name(path, found)
        return _of_trainer_state(content, name) if "log_history" in content else _of_record(content, name)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise RunUnreadable(
            f"this is no record of a run ({type(error).__name__}: {error})",
            where=str(found),
            fix=f"name the output_dir of a run, its {RECORD} or its {TRAINER_STATE}",
        ) from None


def _find(path: Path) -> Path | None:
    if path.is_file():
        return path
    checkpoints = sorted(
        path.glob(f"checkpoint-*/{TRAINER_STATE}"), key=lambda state: (_step(state.parent.name), state)
    )
    candidates = [path / RECORD, path / TRAINER_STATE, *reversed(checkpoints)]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _step(name: str) -> int:
    number = name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _name(given: Path, found: Path) -> str:
    folder = given if given.is_dir() else found.parent
    return folder.resolve().name


def _of_trainer_state(content: dict[str, Any], name: str) -> RunRecord:
    log = [{key: _number(value) for key, value in entry.items()} for entry in content["log_history"]]
    return RunRecord(name=name, state="", max_steps=int(content.get("max_steps") or 0), log=log)


def _of_record(content: dict[str, Any], name: str) -> RunRecord:
    known = {item.name for item in dataclasses.fields(RunRecord)}
    values = {key: value for key, value in content.items() if key in known}
    record = RunRecord(**values)
    record.name = record.name if record.name and isinstance(record.name, str) else name
    record.settings = [Setting(**item) for item in record.settings]  # type: ignore[arg-type]
    record.samples = [Sample(**item) for item in record.samples]  # type: ignore[arg-type]
    record.log = [{key: _number(value) for key, value in entry.items()} for entry in record.log]
    record.step_losses = [_number(value) for value in record.step_losses]
    record.step_norms = [_number(value) for value in record.step_norms]
    record.memory = [(step, now, most) for step, now, most in record.memory]
    record.rows = {int(step): rows for step, rows in record.rows.items()}
    return record


def _number(value: Any) -> Any:
    """What was no number is null in JSON."""
    return math.nan if value is None else value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
