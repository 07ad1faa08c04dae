"""Logs that are written while the next step runs.

A log's numbers lie on the GPU until its step has ended. Who waits for them there launches the next step only then, and
the GPU idles for as long as that takes: 9 ms a log (8B and 1.5B, H200), of steps of 440 and 31 ms. So the numbers set
out for the host when the log is due, and it is written after the next step was launched, as of the step it is about.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

from pronghorn.training.ledger import Unread
from pronghorn.training.meter import Sent, Tally

logger = logging.getLogger("pronghorn")


@dataclass(frozen=True)
class LateLog:
    """A log that is to be written: of which step, its numbers, and the other arguments it is written with."""

    step: int
    epoch: float | None
    loss: Sent
    norm: Sent | None
    sums: Sent
    steps: Unread
    others: tuple[Any, ...]
    named: dict[str, Any]


class LateLogs(TrainerCallback):
    """Of one trainer.

    Args:
        write_now: Transformers' `_maybe_log_save_evaluate`.
    """

    def __init__(self, trainer: Any, write_now: Callable[..., None]) -> None:
        self._trainer, self._write_now = trainer, write_now
        self._due: LateLog | None = None
        #: the log that is being written, so that `log` takes its numbers instead of those there are by now
        self.being_written: LateLog | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """A run begins, or begins again with smaller batches (`auto_find_batch_size`): nothing is left of another."""
        self._due, self._trainer._training = None, Tally()

    def postpones(
        self, loss: torch.Tensor, norm: Any, others: tuple[Any, ...], named: dict[str, Any]
    ) -> bool:
        """Whether the log that is due will be written later; its numbers are on their way then, and `loss` is zero."""
        trainer = self._trainer
        control, state = trainer.control, trainer.state
        due = control.should_log and state.global_step > trainer._globalstep_last_logged
        if not due or not self._may_be_late(loss, norm):
            return False
        self._due = LateLog(
            state.global_step,
            state.epoch,
            Sent.of([loss]),
            None if norm is None else Sent.of([norm]),
            trainer._training.send(),
            trainer._ledger.send(),
            others,
            named,
        )
        loss.zero_()
        control.should_log = False
        return True

    def write(self) -> None:
        """Write the log that was postponed, if there is one."""
        late, self._due = self._due, None
        if late is None:
            return
        (loss,) = late.loss.read()
        norm = None if late.norm is None else late.norm.read()[0]
        self.being_written = late
        try:
            with self._as_of(late):
                self._write_now(torch.tensor(loss), norm, *late.others, **late.named)
        finally:
            self.being_written = None

    def write_after_error(self) -> None:
        """The same, for a run that ends by an error, which is to be told and not another."""
        try:
            self.write()
        except Exception as error:
            logger.warning("pronghorn: the last log could not be written: %s", str(error).partition("\n")[0])

    def _may_be_late(self, loss: torch.Tensor, norm: Any) -> bool:
        """Only where there is a next step to write it in, where nobody needs it now, and a GPU to wait for."""
        trainer = self._trainer
        control, state, args = trainer.control, trainer.state, trainer.args
        ends = (
            control.should_training_stop or control.should_epoch_stop or state.global_step >= state.max_steps
        )
        if ends or control.should_evaluate or control.should_save or args.stop_early:
            return False
        plain = norm is None or isinstance(norm, float) or type(norm) is torch.Tensor
        alone = _is_waited_for(loss) and args.world_size == 1 and plain
        return alone and _is_ours(trainer) and _can_wait(trainer.callback_handler.callbacks)

    @contextmanager
    def _as_of(self, late: LateLog) -> Iterator[None]:
        """State and control as they were when the log was due."""
        state, control = self._trainer.state, self._trainer.control
        flags = ("should_log", "should_evaluate", "should_save")
        now = state.global_step, state.epoch, [getattr(control, flag) for flag in flags]
        state.global_step, state.epoch = late.step, late.epoch
        for flag in flags:
            setattr(control, flag, flag == "should_log")
        try:
            yield
        finally:
            state.global_step, state.epoch, before = now
            for flag, value in zip(flags, before, strict=True):
                setattr(control, flag, value)


def _is_waited_for(loss: torch.Tensor) -> bool:
    return loss.is_cuda


def _is_ours(trainer: Any) -> bool:
    """Whether nothing of a subclass is in a log, such as what it counts in a micro-batch (TRL's `_metrics`)."""
    methods = (getattr(type(trainer), name) for name in ("log", "compute_loss", "training_step"))
    own = all(method.__module__.startswith("pronghorn.") for method in methods)
    return own and "compute_loss" not in vars(trainer) and not trainer._metrics["train"]


def _can_wait(callbacks: Sequence[TrainerCallback]) -> bool:
    """Whether nobody who is told of logs may do something about them that belongs in the same step."""
    return all(
        type(callback).on_log is TrainerCallback.on_log
        or type(callback).__module__.startswith("transformers.")
        or getattr(callback, "takes_late_logs", False)
        for callback in callbacks
    )
