"""Every step's loss, gradient norm and rows, kept without asking the device for a number before a log is written."""

from __future__ import annotations

import math
import statistics
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from pronghorn.training.meter import Sent

#: Steps whose rows are kept: what is told of a step is told within far fewer.
REMEMBERED_STEPS = 4096
#: Steps at the end of a run without a loss that is a number, from which on it is not one row's doing.
_BAD_ENDING = 3


@dataclass(frozen=True)
class Unread:
    """Steps, and the loss and gradient norm of each, one after the other."""

    steps: list[int]
    values: Sent


class StepLedger(TrainerCallback):
    """What logs only have as averages over `logging_steps`.

    `losses` and `norms` are of the optimizer steps `steps`; NaN where a value is not known. `rows` are numbers of rows
    in the data as given, of this process.
    """

    def __init__(self) -> None:
        self.steps = array("q")
        self.losses = array("d")
        self.norms = array("d")
        self._rows: deque[tuple[int, tuple[int, ...]]] = deque(maxlen=REMEMBERED_STEPS)
        self._loss: torch.Tensor | None = None
        self._norm: Any = None
        self._of_step: list[int] = []
        self._unread: list[tuple[int, torch.Tensor | None, Any]] = []

    def saw(self, loss: torch.Tensor, rows: tuple[int, ...]) -> None:
        """A micro-batch was run; `loss` is its share of the step's mean."""
        loss = loss.detach().float()
        self._loss = loss if self._loss is None else self._loss + loss
        self._of_step += rows

    def norm(self, norm: Any) -> None:
        """The gradient's norm of a step, before clipping: a number or a tensor on the device."""
        self._norm = norm.detach() if isinstance(norm, torch.Tensor) else norm

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run begins at its first step, or goes on from the step of its checkpoint."""
        kept = sum(step <= state.global_step for step in self.steps)
        for series in (self.steps, self.losses, self.norms):
            del series[kept:]
        self._unread, self._of_step = [], []
        self._loss = self._norm = None
        self._rows.clear()

    def ended_without_number(self) -> int | None:
        """The step from which on no loss was a number, if a run ended so; a single bad batch at its end is none."""
        good = next((i for i in range(len(self.steps), 0, -1) if math.isfinite(self.losses[i - 1])), 0)
        bad = len(self.steps) - good
        return self.steps[good] if bad and bad >= min(_BAD_ENDING, len(self.steps)) else None

    def take_over(self, steps: Sequence[int], losses: Sequence[float], norms: Sequence[float]) -> None:
        """What another process knew of the steps before, if this one knows nothing."""
        if not self.steps:
            self.steps.extend(steps)
            self.losses.extend(losses)
            self.norms.extend(norms)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close(state.global_step)

    def _close(self, step: int) -> None:
        self._unread.append((step, self._loss, self._norm))
        self._rows.append((step, tuple(self._of_step)))
        self._loss, self._norm, self._of_step = None, None, []

    def send(self) -> Unread:
        """What arrived since the last log sets out for the host; to be taken in by `take`."""
        unread, self._unread = self._unread, []
        values = [math.nan if value is None else value for _, *pair in unread for value in pair]
        return Unread([step for step, *_ in unread], Sent.of(values))

    def take(self, unread: Unread) -> None:
        """Take in what was sent (waits for it)."""
        self._take(unread.steps, unread.values.read())

    def read(self, accelerator: Any) -> None:
        """A log is written: take over what arrived since the last one, the mean over all processes (waits)."""
        unread = self.send()
        if not unread.steps:
            return
        read = unread.values.read()
        if accelerator.num_processes > 1:
            read = accelerator.reduce(torch.tensor(read).to(accelerator.device), reduction="mean").tolist()
        self._take(unread.steps, read)

    def _take(self, steps: Sequence[int], values: Sequence[float]) -> None:
        for step, loss, norm in zip(steps, values[::2], values[1::2], strict=True):
            self.steps.append(step)
            self.losses.append(loss)
            self.norms.append(norm)

    def read_rest(self, accelerator: Any, step: int) -> None:
        """A run of one process ended by an error in `step`: take over the steps since the last log, and that one if its
        loss or norm is no number. (What is a number there may be a part of the step's mean.)
        """
        if accelerator.num_processes > 1:  # the others need not come here
            return
        self.read(accelerator)
        known = [float(value) for value in (self._loss, self._norm) if value is not None]
        if not all(map(math.isfinite, known)):
            self._close(step)
            self.read(accelerator)

    def averaged(self, most: int) -> tuple[list[int], list[float], list[float]]:
        """Steps, losses and norms, at most `most` of each; of more, averages of equal stretches at their last steps."""
        width = max(-(-len(self.steps) // most), 1)
        ends = range(width - 1, len(self.steps), width)
        steps = [self.steps[end] for end in ends]
        losses, norms = (
            [statistics.fmean(series[end + 1 - width : end + 1]) for end in ends]
            for series in (self.losses, self.norms)
        )
        return steps, losses, norms

    def rows(self) -> dict[int, tuple[int, ...]]:
        """Rows by step, in their order, of the steps that are remembered."""
        return {step: rows for step, rows in self._rows if rows}
