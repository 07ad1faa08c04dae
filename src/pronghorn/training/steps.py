"""The trainer's micro-batches as steps of static shape, captured as CUDA graphs on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from accelerate.utils import DistributedType

from pronghorn.data.budgets import Budgets
from pronghorn.engine import TrainingStep
from pronghorn.engine.flat import FlatAdapters
from pronghorn.errors import OutOfMemory
from pronghorn.training.memory import RunMemory, take_memory

logger = logging.getLogger("pronghorn")

T = TypeVar("T")


class StaticSteps:
    """Runs a trainer's micro-batches through `engine.TrainingStep`, where nothing asks for another way.

    Args:
        trainer: a `pronghorn.SFTTrainer`, or another one.
        own_loss: why the loss is not the engine's, or None.
        run: what the trainer's steps take; None: those of an SFTTrainer.
    """

    def __init__(self, trainer: Any, own_loss: str | None = None, run: RunMemory | None = None) -> None:
        self._trainer, self._memory = trainer, run or RunMemory(trainer)
        self._step: TrainingStep | None = None
        self._why_not = own_loss or _why_ordinary(trainer, self._memory.bound)
        self._planned = False
        self._told: set[str] = set()
        self._too_large: float = float("inf")
        if self._why_not is not None and self._memory.bound:
            self._tell(self._why_not)

    @property
    def captures(self) -> bool:
        """Whether CUDA graphs are wanted and nothing is known to be against them."""
        trainer = self._trainer
        wanted = getattr(trainer.args, "cuda_graphs", True) and trainer.args.device.type == "cuda"
        return bool(wanted and self._why_not is None)

    def budgets(self) -> Budgets | None:
        """The sizes batches are rounded up to; None where no graph needs them."""
        if not self.captures:
            return None
        largest = self._memory.largest()
        return Budgets(None if largest is None else largest.tokens)

    def run(self, inputs: Mapping[str, Any], normalizer: Any) -> Any:
        """One micro-batch forward and backward: what the task gives, a named tuple of sums over the micro-batch. None
        where the trainer has to do it in its ordinary way."""
        step = self._ready()
        if step is None:
            return None
        output = self._run(step, self._for_the_model(inputs), normalizer)
        if output is None and step.reason is not None:
            self._tell(step.reason)
        return output

    def takes(self, inputs: Mapping[str, Any]) -> bool:
        """Whether `run` runs such a micro-batch."""
        step = self._ready()
        if step is None:
            return False
        taken = step.takes(self._for_the_model(inputs))
        if step.reason is not None:
            self._tell(step.reason)
        return taken

    def _for_the_model(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if name not in self._memory.bookkeeping}

    def _ready(self) -> TrainingStep | None:
        """The step, with the run's memory taken; None where every micro-batch takes the trainer's ordinary way."""
        if self._why_not is not None:
            self._plan_once()
            return None
        if self._step is None:
            context = self._trainer.compute_loss_context_manager
            model, task = self._trainer.model, self._memory.task()
            self._step = TrainingStep(model, capture=self.captures, around=context, task=task)
            take_memory(self._memory, self._step)
        return self._step

    def _plan_once(self) -> None:
        """Save levels for steps that the trainer runs in its ordinary way; without a rehearsal."""
        if not self._planned:
            self._planned = True
            take_memory(self._memory, None)

    def _run(self, step: TrainingStep, batch: Mapping[str, Any], normalizer: Any) -> Any:
        """A micro-batch, in parts where it does not fit; their losses and gradients add up to the whole's."""
        tokens = batch["input_ids"].numel() if "input_ids" in batch else 0
        if tokens < self._too_large:
            try:
                return step.run(batch, normalizer)
            except torch.OutOfMemoryError as error:
                # Outside of this block the error would keep the tensors of the failed pass alive.
                failure = str(error).partition("\n")[0]
            self._after_running_out(step, tokens, failure)
        parts = self._memory.split(batch)
        if parts is None:
            raise _does_not_fit(tokens)
        done = [self._run(step, part, normalizer) for part in parts]
        outputs = [output for output in done if output is not None]
        assert len(outputs) == 2, "a part of a batch is a batch of the same kind"
        return type(outputs[0])(*(first + second for first, second in zip(*outputs, strict=True)))

    def _after_running_out(self, step: TrainingStep, tokens: int, failure: str) -> None:
        if not step.gradients_intact:
            raise _does_not_fit(tokens)
        step.release()
        torch.cuda.empty_cache()
        self._too_large = tokens
        # Parts have sizes of their own, too many for graphs.
        step.capture = False
        logger.warning(
            "pronghorn: a micro-batch of %d tokens does not fit (%s): such batches run in parts from here on, with the "
            "same loss and gradients; memory_budget='auto' makes layers keep less instead", tokens, failure,
        )  # fmt: skip

    def flats(self) -> list[FlatAdapters]:
        """Adapters that lie side by side, and their gradients with them."""
        return [] if self._step is None else self._step.flats()

    def whole_gradient(self) -> torch.Tensor | None:
        """The gradient of everything that is trained as one tensor, where it is one."""
        return None if self._step is None else self._step.whole_gradient()

    def release(self) -> None:
        """Give the graphs' memory back; a later run makes them anew."""
        if self._step is not None:
            self._step.release()

    def beside(self, work: Callable[[], T]) -> T:
        """Do other work on the GPU (an evaluation); where memory runs out, once more without the graphs."""
        try:
            return work()
        except torch.OutOfMemoryError:
            if self._step is None or not self._step.holds_graphs:
                raise
        logger.warning(
            "pronghorn: no room beside the captured steps: they are let go and made anew afterwards"
        )
        self.release()
        return work()

    def _tell(self, reason: str) -> None:
        if (
            getattr(self._trainer.args, "cuda_graphs", True)
            and self._trainer.args.device.type == "cuda"
            and reason not in self._told
        ):
            self._told.add(reason)
            logger.warning("pronghorn: steps are not captured as CUDA graphs: %s", reason)


def _does_not_fit(tokens: int) -> OutOfMemory:
    return OutOfMemory(
        f"a micro-batch of {tokens:,} tokens does not fit into the GPU's memory and cannot be split further",
        fix="set memory_budget='auto' (layers keep less), or lower max_length or per_device_train_batch_size",
    )


def _why_ordinary(trainer: Any, bound: bool) -> str | None:
    """Why every micro-batch takes the trainer's ordinary way, or None."""
    if not bound:
        return "the model runs its stock forward"
    if trainer.args.world_size > 1 or trainer.accelerator.distributed_type != DistributedType.NO:
        return "gradients are exchanged between processes during backward"
    if getattr(trainer.accelerator, "scaler", None) is not None:
        return "float16 gradients are scaled by a factor that changes"
    if str(getattr(trainer.args.optim, "value", trainer.args.optim)) in ("lomo", "adalomo"):
        return f"the optimizer {trainer.args.optim} works during backward"
    if trainer.args.torch_empty_cache_steps is not None:
        return "torch_empty_cache_steps is set"
    return None
