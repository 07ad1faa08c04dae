"""What is counted while training and evaluating, without asking the device for a number before it is logged."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from pronghorn.data.rows import IGNORED


@dataclass
class Tally:
    """Sums since the last reading; each a number or a tensor on the device."""

    loss: Any = 0.0
    supervised: Any = 0
    correct: Any = 0
    tokens: Any = 0

    def add(self, *, loss: Any = 0.0, supervised: Any = 0, correct: Any = 0, tokens: Any = 0) -> None:
        """Count one batch."""
        self.loss = self.loss + loss
        self.supervised = self.supervised + supervised
        self.correct = self.correct + correct
        self.tokens = self.tokens + tokens

    def read(self, accelerator: Any) -> Tally:
        """The sums over all processes as plain numbers (waits for the device), counting anew from here."""
        values = [self.loss, self.supervised, self.correct, self.tokens]
        device = accelerator.device
        wide = torch.float32 if device.type == "mps" else torch.float64
        # Numbers go over together, tensors are already there.
        stacked = torch.stack([torch.as_tensor(value, device=device).detach().to(wide) for value in values])
        loss, supervised, correct, tokens = accelerator.reduce(stacked, reduction="sum").tolist()
        self.__init__()  # type: ignore[misc]
        return Tally(loss, int(supervised), int(correct), int(tokens))

    @property
    def mean_loss(self) -> float:
        """Loss per supervised token, after `read`."""
        return float(self.loss / self.supervised) if self.supervised else float("nan")

    @property
    def accuracy(self) -> float:
        """Share of supervised tokens that were the most likely prediction, after `read`."""
        return float(self.correct / self.supervised) if self.supervised else 0.0


class Stopwatch:
    """Time spent training since the last lap, without what was paused (evaluation, saving)."""

    def __init__(self) -> None:
        self._began: float | None = None

    def start(self) -> None:
        """Begin the first lap, once."""
        if self._began is None:
            self._began = time.perf_counter()

    def lap(self) -> float:
        """Seconds since `start` or the last lap."""
        now = time.perf_counter()
        seconds = now - self._began if self._began is not None else 0.0
        self._began = now
        return seconds

    def skip(self, seconds: float) -> None:
        """Leave seconds that were not spent training out of the lap."""
        if self._began is not None:
            self._began += seconds


def supervised_tokens(batch: dict[str, Any]) -> Any:
    """Supervised tokens of a batch: a plain number where the collator counted them, else a tensor."""
    if "supervised" in batch:
        return batch["supervised"]
    if "loss_rows" in batch:
        return batch["loss_rows"].numel()
    return batch["labels"][..., 1:].ne(IGNORED).sum()


def at_least_one(count: Any) -> Any:
    """A number of tokens to divide by, a plain number or a tensor on the device."""
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)


def real_tokens(batch: dict[str, Any]) -> Any:
    """Tokens of a batch without padding."""
    if "real_tokens" in batch:
        return batch["real_tokens"]
    return batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
