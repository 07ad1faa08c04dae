"""Checkpoints that are complete or not there: written aside and renamed, pointed to, found again."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pronghorn.errors import CheckpointMissing, ResumeMismatch, SaveFailed
from pronghorn.export.folder import DISK_FULL

logger = logging.getLogger("pronghorn")

POINTER = "last_checkpoint"
STAGING = ".unfinished"
#: Transformers writes it last, so a checkpoint without it is incomplete.
_WRITTEN_LAST = "trainer_state.json"
_WEIGHTS = re.compile(
    r"^(model|adapter_model|pytorch_model).*\.(safetensors|bin)$|^pytorch_model_fsdp|^global_step"
)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint's state and weights are there."""
    if not (checkpoint / _WRITTEN_LAST).is_file() or (checkpoint / _WRITTEN_LAST).stat().st_size == 0:
        return False
    return any(_WEIGHTS.match(entry.name) for entry in checkpoint.iterdir())


def step_of(checkpoint: Path) -> int:
    """The step in a folder's name, -1 without one."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else -1


def newest_checkpoint(output_dir: str | Path) -> Path:
    """The newest complete checkpoint under `output_dir`; incomplete ones are passed over with a note.

    The one that `last_checkpoint` leads to and those before it come first: a longer run before may have left others.

    Raises:
        CheckpointMissing: there is none.
    """
    folder = Path(output_dir)
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0]
    last = _pointed_to(folder)
    for checkpoint in sorted(found, key=lambda path: (step_of(path) <= last, step_of(path)), reverse=True):
        if is_complete(checkpoint):
            return checkpoint
        logger.warning("pronghorn: %s is incomplete and is passed over", checkpoint)
    raise CheckpointMissing(
        "there is no complete checkpoint to resume from",
        where=str(folder),
        fix="train without resuming, or name the folder that has checkpoint-N in it",
    )


def _pointed_to(folder: Path) -> int:
    """The step that `last_checkpoint` names, -1 where it leads nowhere."""
    pointer = folder / POINTER
    if not pointer.exists():
        return -1
    if pointer.is_file():
        return step_of(folder / pointer.read_text(encoding="utf-8").strip())
    return step_of(pointer.resolve())


def checkpoint_at(path: str | Path) -> Path:
    """A checkpoint named by hand: its folder, or `last_checkpoint` where that is a file with the name.

    Raises:
        CheckpointMissing: it does not exist or is incomplete.
    """
    checkpoint = Path(path)
    if checkpoint.is_file() and checkpoint.name == POINTER:
        checkpoint = checkpoint.parent / checkpoint.read_text(encoding="utf-8").strip()
    if not checkpoint.is_dir():
        raise CheckpointMissing("there is no such checkpoint", where=str(path), fix="check the path")
    if not is_complete(checkpoint):
        raise CheckpointMissing(
            "the checkpoint is incomplete: its writing was interrupted",
            where=str(path),
            fix="resume from an earlier one, or give True for the newest complete one",
        )
    return checkpoint


def point_to(checkpoint: Path) -> None:
    """Make `last_checkpoint` beside `checkpoint` lead to it: a relative link, or a file with its name."""
    pointer = checkpoint.parent / POINTER
    temporary = checkpoint.parent / f"{POINTER}.tmp"
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(checkpoint.name, target_is_directory=True)
    except (OSError, NotImplementedError):
        temporary.write_text(checkpoint.name + "\n", encoding="utf-8")
    os.replace(temporary, pointer)


def publish(staged: Path, checkpoint: Path) -> None:
    """Rename a finished folder to its place; a folder already there gives way only then."""
    if checkpoint.exists():
        aside = staged.parent / f"{checkpoint.name}.old"
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
    os.replace(staged, checkpoint)
    shutil.rmtree(staged.parent, ignore_errors=True)


@contextmanager
def saving(what: str, folder: Path, remove: Path | None = None) -> Iterator[None]:
    """Turn a failed write into one clear error; whatever fails, `remove` is gone afterwards.

    Raises:
        SaveFailed: with the cause; the disk's free space where that is the cause.
    """
    try:
        yield
    except BaseException as error:
        if remove is not None:
            shutil.rmtree(remove, ignore_errors=True)
        if not _is_write_error(error):
            raise
        raise _save_failed(what, folder, error) from error


def check_output(folder: Path) -> None:
    """Make the folder that a run writes to, and write to it.

    Raises:
        SaveFailed: that is not possible, which nobody wants to learn after training.
    """
    with saving("the run's output", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def _is_write_error(error: BaseException) -> bool:
    """OSError, or how torch and safetensors report one."""
    text = f"{type(error).__name__}: {error}"
    marks = ("SafetensorError", "PytorchStreamWriter", "inline_container")
    return isinstance(error, OSError) or any(mark in text for mark in marks)


def _save_failed(what: str, folder: Path, error: BaseException) -> SaveFailed:
    full = getattr(error, "errno", None) in DISK_FULL or re.search(
        r"no space left|os error 28|disk quota|unexpected pos|PytorchStreamWriter failed writing",
        str(error),
        re.I,
    )
    if full:
        return SaveFailed(
            f"{what} could not be written: the disk is full", where=str(folder),
            fix="free some space or choose another output_dir, and resume from the last complete checkpoint; "
            "save_total_limit keeps fewer of them",
        )  # fmt: skip
    return SaveFailed(
        f"{what} could not be written: {error}", where=str(folder), fix="check the folder and its permissions"
    )


def check_same_adapter(checkpoint: Path, model: Any) -> None:
    """Refuse to go on from the checkpoint of another adapter, before anything of it is loaded.

    Raises:
        ResumeMismatch: naming what differs from the adapter that is trained now.
    """
    path = checkpoint / "adapter_config.json"
    configs = getattr(model, "peft_config", None)
    if any(checkpoint.glob("*/adapter_config.json")) or (configs is not None and set(configs) != {"default"}):
        return  # adapters by other names, in folders of their own, which PEFT checks
    if configs is None or not path.is_file():
        if (configs is None) == (not path.is_file()):
            return
        has, trains = ("no adapter", "one") if configs is not None else ("an adapter", "all weights")
        raise ResumeMismatch(
            f"the checkpoint holds {has}, and this run trains {trains}",
            where=str(checkpoint),
            fix="resume with the settings of that run, or begin anew in another output_dir",
        )
    saved = json.loads(path.read_text(encoding="utf-8"))
    now = configs["default"].to_dict()
    differing = [
        f"{name} is {_plain(saved[name])} there and {_plain(now[name])} here"
        for name in ("peft_type", "r", "target_modules", "modules_to_save", "use_dora", "rank_pattern")
        if name in saved and name in now and _plain(saved[name]) != _plain(now[name])
    ]
    if differing:
        raise ResumeMismatch(
            f"the checkpoint's adapter is another one than this run trains: {'; '.join(differing)}",
            where=str(path),
            fix="set these to what they are there, or begin anew in another output_dir",
        )


def _plain(value: Any) -> Any:
    """A config's value as JSON would hold it, without regard to the order of names."""
    if isinstance(value, (list, tuple, set)):
        return sorted(map(str, value))
    return getattr(value, "value", value) or None
