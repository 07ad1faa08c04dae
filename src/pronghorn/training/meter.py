"""What is counted while training and evaluating, without asking the device for a number before it is logged."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pronghorn.data.rows import IGNORED


@dataclass(frozen=True)
class Sent:
    """Numbers, of which those on a device are on their way to the host."""

    numbers: tuple[float | None, ...]
    arriving: torch.Tensor | None
    arrived: torch.cuda.Event | None

    @classmethod
    def of(cls, values: Sequence[Any]) -> Sent:
        """Numbers and tensors of one element; nothing here waits for a device."""
        there = [value.detach().reshape(()) for value in values if isinstance(value, torch.Tensor)]
        numbers = tuple(None if isinstance(value, torch.Tensor) else float(value) for value in values)
        if not there:
            return cls(numbers, None, None)
        wide = _widest(there[0].device)
        stacked = torch.stack([value.to(there[0].device, wide) for value in there])
        if not stacked.is_cuda:
            return cls(numbers, stacked, None)
        held = torch.empty(stacked.shape, dtype=wide, pin_memory=True).copy_(stacked, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(numbers, held, arrived)

    def read(self) -> list[float]:
        """All of them, waiting for those that have not arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        there = iter([] if self.arriving is None else self.arriving.tolist())
        return [next(there) if number is None else number for number in self.numbers]


def _widest(device: torch.device) -> torch.dtype:
    """Of the device's floating-point numbers: counts beyond 2^24 are none of fp32."""
    return torch.float32 if device.type == "mps" else torch.float64


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

    def send(self) -> Sent:
        """The sums, counting anew from here; `Tally.of` what arrives."""
        sent = Sent.of([self.loss, self.supervised, self.correct, self.tokens])
        self.__init__()  # type: ignore[misc]
        return sent

    @classmethod
    def of(cls, sums: Sequence[float]) -> Tally:
        loss, supervised, correct, tokens = sums
        return cls(loss, int(supervised), int(correct), int(tokens))

    def read(self, accelerator: Any) -> Tally:
        """The sums over all processes as plain numbers (waits for the device), counting anew from here."""
        sums = self.send().read()
        if accelerator.num_processes > 1:
            device = accelerator.device
            here = torch.tensor(sums, dtype=_widest(device), device=device)
            sums = accelerator.reduce(here, reduction="sum").tolist()
        return Tally.of(sums)

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
