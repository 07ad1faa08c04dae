"""Of any trainer: checkpoints that are complete or not there, a resume that is checked, and a table of steps."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from pronghorn.errors import PackageMissing, UnknownArgument
from pronghorn.importing import left_out_of_collections
from pronghorn.training.checkpoints import (
    STAGING,
    check_output,
    check_same_adapter,
    checkpoint_at,
    newest_checkpoint,
    point_to,
    publish,
    saving,
    step_of,
)
from pronghorn.training.meter import Stopwatch
from pronghorn.training.progress import ProgressTable
from pronghorn.training.steps import StaticSteps

logger = logging.getLogger("pronghorn")

#: bytes on a GPU besides a model that are not worth a collection: workspaces of libraries, tables of positions
_LITTLE = 256 << 20


def is_alone_on_gpu(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether what this process holds on a GPU is the model, but for little: then no garbage holds any."""
    if device.type != "cuda":
        return False
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.device == device]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return torch.cuda.memory_allocated(device) < 1.05 * sum(storages.values()) + _LITTLE


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


class SafeTrainer(transformers.Trainer):
    """Transformers' Trainer, or before one derived from it in a class's bases, with our checkpoints and progress."""

    _watch: Stopwatch
    _staging: Path | None = None
    _progress: ProgressTable | None = None
    #: made by the trainers that run steps of static shape, at the first of them
    _steps: StaticSteps | None = None

    def __init__(self, *given: Any, args: Any = None, **more: Any) -> None:
        if args is not None and args.should_save and args.output_dir is not None:
            check_output(Path(args.output_dir))
        super().__init__(*given, args=args, **more)

    def _show_progress(self) -> None:
        """Our table instead of Transformers' bar and dictionaries; `disable_tqdm` turns both off."""
        shown = [self.pop_callback(kind) for kind in (ProgressCallback, PrinterCallback)]
        if any(shown) and not self.args.disable_tqdm:
            self._progress = ProgressTable()
            self.add_callback(self._progress)

    @contextmanager
    def _not_training(self) -> Iterator[None]:
        """Time that does not count for tokens per second."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._watch.skip(time.perf_counter() - began)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint` is True for the newest complete checkpoint in output_dir, or a folder. With
        `max_steps=0` or `num_train_epochs=0` nothing is trained, which is said.

        Raises:
            UnknownArgument: nothing of the model is to be trained.
            CheckpointMissing, ResumeMismatch: there is none to resume from, or one of another adapter.
            SaveFailed: a checkpoint could not be written; none is left half-written.
        """
        asked = "max_steps" if self.args.max_steps == 0 else "num_train_epochs"
        if self.args.max_steps == 0 or (self.args.max_steps < 0 and self.args.num_train_epochs <= 0):
            # Transformers looks for the end after a step only.
            logger.warning("pronghorn: %s=0: nothing is trained", asked)
            return TrainOutput(0, 0.0, {})
        self._check_that_something_is_trained()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest_checkpoint(self.args.output_dir))
        elif resume_from_checkpoint:
            resume_from_checkpoint = str(checkpoint_at(resume_from_checkpoint))
        if resume_from_checkpoint:
            check_same_adapter(Path(resume_from_checkpoint), self.accelerator.unwrap_model(self.model))
        self._watch = Stopwatch()
        if resume_from_checkpoint and 0 < self.args.max_steps <= step_of(Path(resume_from_checkpoint)):
            return self._already_trained(resume_from_checkpoint)
        self.model.train()  # before memory is planned: lets go of what is kept for answers
        # The Trainer begins with a collection, for what others left on the GPU.
        unneeded = is_alone_on_gpu(self.model, self.args.device)
        with self._while_training(), left_out_of_collections() if unneeded else nullcontext():
            return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _check_that_something_is_trained(self) -> None:
        """
        Raises:
            UnknownArgument: every parameter is frozen, which a backward pass would tell in its own words.
        """
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UnknownArgument(
                "no parameter of the model is to be trained: all are frozen",
                fix="put an adapter on it (get_peft_model), load a saved one with is_trainable=True, or load the model "
                "with full_finetuning=True",
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own.

        Raises:
            PackageMissing: `optim` needs one.
            UnknownArgument: it cannot be made of what was given.
        """
        optim = str(getattr(self.args.optim, "value", self.args.optim))
        try:
            return super().create_optimizer(*args, **kwargs)
        except ImportError as error:
            raise PackageMissing(
                f"optim='{optim}' needs a package: {_in_a_line(error)}",
                fix="install it, or use 'adamw_torch'",
            ) from error
        except (ValueError, TypeError) as error:
            raise UnknownArgument(
                f"optim='{optim}' cannot be made: {_in_a_line(error)}",
                fix="change optim, optim_args or what the message names",
            ) from error

    @contextmanager
    def _while_training(self) -> Iterator[None]:
        """What stands around a training; also left after an error."""
        try:
            yield
        finally:
            if self._progress is not None:
                self._progress.close()
            if self._steps is not None:
                self._steps.release()

    def _already_trained(self, checkpoint: str) -> TrainOutput:
        """The state at a run's end, loaded. Transformers would train one more step, as it looks only after a step."""
        logger.warning("pronghorn: %s is at the last step: there is nothing left to train", checkpoint)
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(self.state.global_step, 0.0, {})

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Written under a temporary name and renamed when complete; `last_checkpoint` then leads to it."""
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staging = run_dir / STAGING
        with self._not_training(), saving(name, run_dir, remove=None if self.args.push_to_hub else staging):
            if self.args.push_to_hub:  # it uploads the folder in the background, which must not move then
                super()._save_checkpoint(model, trial)
            else:
                self._staging = staging
                try:
                    super()._save_checkpoint(model, trial)
                finally:
                    self._staging = None
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._publish(staging / name, run_dir / name)
            if self.args.should_save:
                point_to(run_dir / name)

    def _publish(self, staged: Path, checkpoint: Path) -> None:
        """Move a finished checkpoint to its place, then remove the ones beyond save_total_limit."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == staged:
            self.state.best_model_checkpoint = str(checkpoint)
            self.state.save_to_json(os.path.join(staged, TRAINER_STATE_NAME))
        publish(staged, checkpoint)
        rotate_checkpoints(
            output_dir=str(checkpoint.parent),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model (an adapter model: its adapter).

        Raises:
            SaveFailed: the disk is full, or the folder cannot be written.
        """
        with saving("the model", Path(output_dir or self.args.output_dir)):
            super().save_model(output_dir, _internal_call)
