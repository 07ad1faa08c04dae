"""The trainer's micro-batches as steps of static shape, captured as CUDA graphs on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from accelerate.utils import DistributedType

from pronghorn.data.budgets import Budgets
from pronghorn.data.collator import BOOKKEEPING
from pronghorn.data.split import split_batch
from pronghorn.engine import StepOutput, TrainingStep
from pronghorn.errors import OutOfMemory
from pronghorn.training.memory import largest_batch, take_memory
from pronghorn.training.setup import is_bound

logger = logging.getLogger("pronghorn")

T = TypeVar("T")


class StaticSteps:
    """Runs a trainer's micro-batches through `engine.TrainingStep`, where nothing asks for another way.

    Args:
        trainer: a `pronghorn.SFTTrainer`.
        own_loss: why the loss is not the engine's, or None.
    """

    def __init__(self, trainer: Any, own_loss: str | None) -> None:
        self._trainer = trainer
        self._step: TrainingStep | None = None
        self._why_not = own_loss or _why_ordinary(trainer)
        self._planned = False
        self._told: set[str] = set()
        self._too_large: float = float("inf")
        if self._why_not is not None and is_bound(trainer.model):
            self._tell(self._why_not)

    @property
    def captures(self) -> bool:
        """Whether CUDA graphs are wanted and nothing is known to be against them."""
        trainer = self._trainer
        wanted = trainer.args.cuda_graphs and trainer.args.device.type == "cuda"
        return bool(wanted and self._why_not is None)

    def budgets(self) -> Budgets | None:
        """The sizes batches are rounded up to; None where no graph needs them."""
        if not self.captures:
            return None
        largest = largest_batch(self._trainer)
        return Budgets(None if largest is None else largest.tokens)

    def run(self, inputs: Mapping[str, Any], normalizer: Any) -> StepOutput | None:
        """One micro-batch forward and backward, or None where the trainer has to do it in its ordinary way."""
        if self._why_not is not None:
            self._plan_once()
            return None
        batch = {name: value for name, value in inputs.items() if name not in BOOKKEEPING}
        if self._step is None:
            context = self._trainer.compute_loss_context_manager
            self._step = TrainingStep(self._trainer.model, capture=self.captures, around=context)
            take_memory(self._trainer, self._step)
        output = self._run(self._step, batch, normalizer)
        if output is None and self._step.reason is not None:
            self._tell(self._step.reason)
        return output

    def _plan_once(self) -> None:
        """Save levels for steps that the trainer runs in its ordinary way; without a rehearsal."""
        if not self._planned:
            self._planned = True
            if self._trainer.args.n_gpu <= 1:
                take_memory(self._trainer, None)

    def _run(self, step: TrainingStep, batch: Mapping[str, Any], normalizer: Any) -> StepOutput | None:
        """A micro-batch, in parts where it does not fit; their losses and gradients add up to the whole's."""
        tokens = batch["input_ids"].numel() if "input_ids" in batch else 0
        if tokens < self._too_large:
            try:
                return step.run(batch, normalizer)
            except torch.OutOfMemoryError as error:
                # Outside of this block the error would keep the tensors of the failed pass alive.
                failure = str(error).partition("\n")[0]
            self._after_running_out(step, tokens, failure)
        parts = split_batch(batch)
        if parts is None:
            raise _does_not_fit(tokens)
        done = [self._run(step, part, normalizer) for part in parts]
        outputs = [output for output in done if output is not None]
        assert len(outputs) == 2, "a part of a batch is a batch of the same kind"
        losses, correct = zip(*((output.loss, output.num_correct) for output in outputs), strict=True)
        return StepOutput(losses[0] + losses[1], correct[0] + correct[1])

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
            self._trainer.args.cuda_graphs
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


def _why_ordinary(trainer: Any) -> str | None:
    """Why every micro-batch takes the trainer's ordinary way, or None."""
    if not is_bound(trainer.model):
        return "the model runs its stock forward"
    if trainer.args.world_size > 1 or trainer.accelerator.distributed_type != DistributedType.NO:
        return "gradients are exchanged between processes during backward"
    if trainer.args.n_gpu > 1:
        return "the model runs on several GPUs at once"
    if getattr(trainer.accelerator, "scaler", None) is not None:
        return "float16 gradients are scaled by a factor that changes"
    if str(getattr(trainer.args.optim, "value", trainer.args.optim)) in ("lomo", "adalomo"):
        return f"the optimizer {trainer.args.optim} works during backward"
    if trainer.args.torch_empty_cache_steps is not None:
        return "torch_empty_cache_steps is set"
    return None
