"""Losses and gradients that are no numbers: noticed without waiting for the device, kept out of the weights, explained.

Every micro-batch leaves its loss's verdict in host memory, read when it has arrived, a micro-batch or two later. Until
then its batch is kept, so that it can be run again (`engine.nonfinite`). A fused optimizer of torch skips the update of
a step whose gradient is not finite, as it does under mixed precision, so that the batch is run again with the weights
it was run with, and one bad row does not end a run.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback

from pronghorn.data.collator import BOOKKEEPING, documents_of
from pronghorn.engine.nonfinite import Finding, find_nonfinite
from pronghorn.errors import NonFiniteLoss
from pronghorn.training.flat_adamw import FlatAdamW

logger = logging.getLogger("pronghorn")

#: Micro-batches whose verdicts may be on their way.
_UNREAD = 64
#: How many bad micro-batches of a run are run again: a warning comes with the first, an error with any.
_MOST_LOOKS = 3
#: Rows of the data that are looked through for the one a batch's document came from.
_SEARCHED_ROWS = 200_000


@dataclass
class _Seen:
    """A micro-batch, or all of a step (`loss` is then its gradient's norm), whose verdict is not read yet."""

    step: int
    batches: list[tuple[dict[str, Any], Any]]
    what: str
    value: torch.Tensor
    verdict: torch.Tensor
    arrived: torch.cuda.Event | None

    def is_known(self) -> bool:
        return self.arrived is None or self.arrived.query()


class NumberWatch(TrainerCallback):
    """Watches one trainer's losses and gradient norms.

    Raises:
        NonFiniteLoss: out of `saw`, `norm` and `read`, when a weight is the cause: nothing trained from there on would
            be worth anything. Other causes are told once, and training goes on.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._unread: deque[_Seen] = deque()
        self._of_step: deque[tuple[dict[str, Any], Any]] = deque(maxlen=_UNREAD)
        self._losses: torch.Tensor | None = None
        self._norm: torch.Tensor | None = None
        #: the warning that was given, if any
        self.told = ""
        self._looks = 0

    # --- what the trainer shows -------------------------------------------------------------------------------------

    def saw(self, inputs: dict[str, Any], normalizer: Any, loss: torch.Tensor) -> None:
        """A micro-batch was run forward and backward."""
        loss = loss.detach()
        self._losses = loss if self._losses is None else self._losses + loss
        batch = {name: value for name, value in inputs.items() if name not in BOOKKEEPING}
        self._of_step.append((batch, normalizer))
        self._note([(batch, normalizer)], "loss", loss)

    def norm(self, norm: Any) -> None:
        """The gradient's norm of a whole step is known, and its update is still to come."""
        if type(norm) is torch.Tensor and not self._scales():
            self._norm = norm.detach()
            self._note(list(self._of_step), "gradient norm", self._norm)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self._optimizer()
        value = self._losses if self._norm is None and args.world_size == 1 else self._norm
        self._losses = self._norm = None
        self._of_step.clear()
        if value is not None and _skips(optimizer) and not self._scales():
            # What a gradient scaler would set: the optimizer leaves everything as it is where this is not zero.
            optimizer.grad_scale, optimizer.found_inf = None, (~torch.isfinite(value.reshape(()))).float()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self._optimizer()
        if _skips(optimizer) and not self._scales():
            optimizer.found_inf = None

    def _optimizer(self) -> Any:
        """torch's own, inside accelerate's."""
        optimizer = self._trainer.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def _scales(self) -> bool:
        """Whether a gradient scaler is at work, which expects overflows and skips updates itself."""
        return getattr(self._trainer.accelerator, "scaler", None) is not None

    def read(self, logs: dict[str, float]) -> None:
        """A log is written: the device has been waited for, so every verdict has arrived."""
        while self._unread:
            self._judge(self._unread.popleft())
        wrong = [name for name in ("loss", "grad_norm") if not math.isfinite(logs.get(name, 0.0))]
        if wrong:
            what = f"{' and '.join(wrong)} is {logs[wrong[0]]} at step {self._trainer.state.global_step}"
            self._warn(f"{what}. {self._advice(None)}")

    # --- verdicts -----------------------------------------------------------------------------------------------------

    def _note(self, batches: list[tuple[dict[str, Any], Any]], what: str, value: torch.Tensor) -> None:
        if self._looks >= _MOST_LOOKS:
            return
        finite, arrived = torch.isfinite(value).reshape(()), None
        if finite.is_cuda:
            verdict = torch.empty((), dtype=torch.bool, pin_memory=True)
            verdict.copy_(finite, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        else:
            verdict = finite
        self._unread.append(
            _Seen(self._trainer.state.global_step + 1, batches, what, value, verdict, arrived)
        )
        while self._unread and (len(self._unread) > _UNREAD or self._unread[0].is_known()):
            self._judge(self._unread.popleft())

    def _judge(self, seen: _Seen) -> None:
        if seen.arrived is not None:
            seen.arrived.synchronize()
        if bool(seen.verdict) or self._looks >= _MOST_LOOKS:
            return
        self._looks += 1
        found, batch = None, seen.batches[0][0] if seen.batches else {}
        try:
            for batch, normalizer in seen.batches:
                found = self._search(batch, normalizer)
                if found is not None:
                    break
            reason = self._described(found, batch)
        except Exception as error:  # an explanation that fails must not hide what it was to explain
            reason = f"the batch could not be run again to find out why ({type(error).__name__}: {error})"
        what = f"the {seen.what} is {float(seen.value)} at step {seen.step}"
        if found is not None and found.kind == "weight":
            raise NonFiniteLoss(f"{what}: {reason}", fix=self._advice(found).rstrip("."))
        self._warn(f"{NonFiniteLoss(f'{what}: {reason}')} {self._advice(found)}")

    def _search(self, batch: dict[str, Any], normalizer: Any) -> Finding | None:
        trainer = self._trainer
        if any(getattr(trainer, f"is_{name}_enabled", False) for name in ("fsdp", "deepspeed")):
            raise RuntimeError("its weights are spread over processes, which would wait for one another")
        work = partial(
            find_nonfinite,
            trainer.model,
            batch,
            normalizer=normalizer,
            around=trainer.compute_loss_context_manager,
        )
        return work() if trainer._steps is None else trainer._steps.beside(work)

    def _warn(self, text: str) -> None:
        if not self.told:
            self.told = text
            logger.warning("pronghorn: %s", text)

    # --- words --------------------------------------------------------------------------------------------------------

    def _described(self, found: Finding | None, batch: dict[str, Any]) -> str:
        """The finding, and the token it begins at in words."""
        if found is None:
            return "every tensor is finite when the batch is run again: weights have changed, or the GPU made a mistake"
        if found.row is None or found.token is None:
            return str(found)
        tokenizer = getattr(self._trainer, "_tokenizer", None)
        text = "" if tokenizer is None else f" {tokenizer.decode([found.token])!r}"
        place = f"row {found.row} of the batch"
        number = self._row_of_data(found.row, batch)
        if number is not None:
            place = f"row {number} of the training data ({place})"
        return f"{found}; the first token it concerns is number {found.position}{text} (id {found.token}) of {place}"

    def _row_of_data(self, row_of_batch: int, batch: dict[str, Any]) -> int | None:
        """The row of the training data, as it was given, that is a document of the batch, by its tokens."""
        offsets, ids = batch.get("cu_seq_lens_q"), batch["input_ids"]
        if offsets is not None:
            start, end = offsets.tolist()[row_of_batch : row_of_batch + 2]
            document = ids.reshape(-1)[start:end].tolist()
        else:
            document = ids[row_of_batch].tolist()
            mask = batch.get("attention_mask")
            if mask is not None:
                document = ids[row_of_batch][mask[row_of_batch].bool()].tolist()
        dataset = self._trainer.train_dataset
        if not hasattr(dataset, "__len__"):
            return None
        for number in range(min(len(dataset), _SEARCHED_ROWS)):
            row = dataset[number]
            if "input_ids" not in row:
                return None
            for at, part in enumerate(documents_of(row)):
                if part.ids.tolist() == document:
                    given = int(row["rows"][at]) if row.get("rows") else number
                    return self._trainer._numbers_of([given])[0]
        return None

    def _advice(self, found: Finding | None) -> str:
        trainer = self._trainer
        if found is not None and found.kind == "weight":
            if trainer.state.global_step == 0 or not _is_trained(trainer.model, found.tensor):
                return "load or download the checkpoint again: it holds that value already"
            return (
                f"resume from a checkpoint before, with a lower learning_rate (now {_rate(trainer):.1e}) or more "
                "warmup_steps; optim='adamw_torch_fused' leaves weights alone when a gradient is no number"
            )
        if found is not None and found.overflowed:
            return "numbers leave float16's range: load with dtype='bfloat16', or 'float32'"
        return (
            f"Lower learning_rate (now {_rate(trainer):.1e}) or raise warmup_steps; if the model is float16, use "
            "bfloat16; check the rows for broken text"
        )


def _skips(optimizer: Any) -> bool:
    """Whether an optimizer heeds `found_inf`: torch's own, fused."""
    groups = getattr(optimizer, "param_groups", None)
    return (
        (type(optimizer).__module__.startswith("torch.optim") or type(optimizer) is FlatAdamW)
        and bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        and groups is not None
        and all(group.get("fused") for group in groups)
    )


def _is_trained(model: Any, name: str) -> bool:
    return any(own == name and p.requires_grad for own, p in model.named_parameters())


def _rate(trainer: Any) -> float:
    scheduler = trainer.lr_scheduler
    return float(scheduler.get_last_lr()[0]) if scheduler is not None else float("nan")
