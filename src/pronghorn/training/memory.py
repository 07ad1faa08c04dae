"""The largest batch of a run: planned for, rehearsed before the first step, and what is done when memory runs out."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pronghorn.data.budgets import power_of_two
from pronghorn.data.collator import BOOKKEEPING
from pronghorn.data.images import has_images
from pronghorn.data.split import split_batch
from pronghorn.engine import AUTO, Binding, LanguageTask, Task, TrainingStep, binding_of
from pronghorn.engine.gathered import gather_for
from pronghorn.engine.planning import levels_without_gpu, plan_levels, shape_of
from pronghorn.engine.tower_memory import vision_bytes
from pronghorn.errors import BudgetInvalid, BudgetTooSmall, OutOfMemory
from pronghorn.hardware import gpu_memory
from pronghorn.memory import Batch, Plan, available_host_bytes, estimate

logger = logging.getLogger("pronghorn")

#: of a plan whose rehearsal ran out of memory, the shares that are planned for next
SHARES_OF_A_PLAN = (0.9, 0.75)


def largest_batch(trainer: Any) -> Batch | None:
    """The most tokens a micro-batch of the run can have, with as many rows of the loss; None when it is not known."""
    args = trainer.args
    longest = _longest_row(trainer.train_dataset)
    limits = [int(length) for length in (args.max_length, longest) if length is not None]
    if not limits:
        return None
    tokens = min(limits) * args.per_device_train_batch_size
    return Batch(tokens, tokens, args.per_device_train_batch_size)


def planned_reserved(binding: Binding, batch: Batch, capability: tuple[int, int]) -> int:
    """Bytes that a step of the largest batch is expected to reserve at the save levels as they are."""
    shape, levels = shape_of(binding), binding.save_levels
    text = estimate(shape, levels, batch, tile_rows=binding.tile_rows, capability=capability).reserved
    return text + vision_bytes(binding, batch.tokens)


def _longest_row(dataset: Any) -> int | None:
    """Tokens of the longest row, where the data set can be asked cheaply."""
    table = getattr(dataset, "data", None)
    if table is None or "input_ids" not in getattr(dataset, "column_names", ()):
        return None
    import pyarrow.compute as pc

    lengths = pc.list_value_length(table.column("input_ids"))
    return pc.max(lengths).as_py()  # type: ignore[no-any-return, attr-defined]


class RunMemory:
    """What the steps of a run take: of an SFTTrainer's here.

    Args:
        trainer: its model is bound, or not.
    """

    #: keys of a batch that are not for the model
    bookkeeping: Sequence[str] = BOOKKEEPING

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    @property
    def bindings(self) -> list[Binding]:
        """Of the decoders whose levels are planned; none where one of them is not bound."""
        binding = binding_of(self.trainer.model)
        return [] if binding is None or not binding.bound else [binding]

    @property
    def bound(self) -> bool:
        return bool(self.bindings)

    @property
    def budget(self) -> str | int | None:
        """What the user allows."""
        return self.trainer.args.memory_budget  # type: ignore[no-any-return]

    def task(self) -> Task:
        """What a step computes."""
        return LanguageTask(self.trainer.model)

    def largest(self) -> Batch | None:
        """The largest batch of the run; None where it is not known."""
        return largest_batch(self.trainer)

    def plan(self, budget: str | int, batch: Batch) -> Plan:
        """Choose levels for a budget and set them.

        Raises:
            BudgetTooSmall, BudgetInvalid: as `engine.planning.plan_levels`.
        """
        return plan_levels(self.bindings[0], budget, batch)

    def gather(self, budget: str | int, batch: Batch) -> None:
        """Move frozen weights together where a budget is tight; before steps are laid out.

        Raises:
            BudgetInvalid: a budget that is no size.
        """
        bindings = self.bindings
        if len(bindings) == 1:
            gather_for(bindings[0], budget, batch)

    def rehearse(self, step: TrainingStep, batch: Batch) -> None:
        """A step of the largest batch over nothing.

        Raises:
            torch.OutOfMemoryError: it does not fit.
        """
        assert isinstance(step.task, LanguageTask)
        longest = batch.tokens // self.trainer.args.per_device_train_batch_size
        documents, device = power_of_two(batch.documents), self.trainer.args.device
        sizes = batch.tokens, batch.loss_rows, documents, min(power_of_two(longest), batch.tokens)
        step.rehearse(step.task.nonsense(device, *sizes))
        if has_images(next(iter(self.trainer.train_dataset), None)):
            step.rehearse(step.task.nonsense(device, *sizes, images=True))

    def split(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Two batches whose losses and gradients add up to a batch's; None where it cannot be split."""
        return split_batch(batch)


def take_memory(run: RunMemory, step: TrainingStep | None) -> None:
    """Plan the save levels where the run has a `memory_budget` or nobody chose any, and on a GPU rehearse the largest
    batch before anything is trained.

    Args:
        step: what rehearses; None where the run's steps are the trainer's ordinary ones.

    Raises:
        BudgetTooSmall: the batch fits at no levels; with numbers and the smallest change that helps.
        BudgetInvalid: a budget that is no size, or one for a run whose largest batch is not known.
        OutOfMemory: the GPU has less than the budget says, because others use it.
    """
    batch, budget = run.largest(), run.budget
    if not run.bound:
        return
    automatic = any(binding.automatic for binding in run.bindings)
    if run.trainer.args.device.type != "cuda":
        if budget is not None:
            logger.warning("pronghorn: memory_budget=%s is for a GPU's memory and has no effect here", budget)
        for binding in run.bindings:
            if binding.automatic and batch is not None:
                level = levels_without_gpu(binding, batch, available_host_bytes())
                binding.use_plan([level] * len(binding.layers), None)
        return
    if batch is None:
        if budget is not None:
            raise BudgetInvalid(
                "memory_budget needs to know the longest row, and the data is a stream without max_length",
                fix="set max_length",
            )
        return
    if step is not None:
        if budget is not None or automatic:
            run.gather(AUTO if budget is None else budget, batch)
        # What lives from step to step is asked of the allocator instead of guessed.
        step.lay_out()
    if budget is not None and budget != AUTO:
        found = _plan(run, budget, batch)
        if found.budget <= gpu_memory(run.trainer.args.device).within_reach:
            _rehearse_or_take_less(run, step, batch, found)
            return
        try:
            _rehearse(run, step, batch)
        except torch.OutOfMemoryError as error:
            raise _less_than_planned(run.trainer, budget, found, error) from None
    elif budget is None and not automatic:
        try:
            _rehearse(run, step, batch)
        except torch.OutOfMemoryError:
            logger.warning("pronghorn: the largest batch (%d tokens) does not fit as set", batch.tokens)
            _plan_what_is_free(run, step, batch)
    else:
        _plan_what_is_free(run, step, batch)


def _plan_what_is_free(run: RunMemory, step: TrainingStep | None, batch: Batch) -> None:
    """Levels for all the memory there is.

    Raises:
        BudgetTooSmall, torch.OutOfMemoryError: the batch fits at no levels.
    """
    torch.cuda.empty_cache()
    try:
        found = _plan(run, AUTO, batch)
    except BudgetTooSmall:
        # What is left to others by default is a tenth of a small GPU; the rehearsal shows whether it works without.
        found = _plan(run, gpu_memory(run.trainer.args.device).within_reach, batch)
    _rehearse_or_take_less(run, step, batch, found)


def _rehearse_or_take_less(run: RunMemory, step: TrainingStep | None, batch: Batch, found: Plan) -> None:
    """Where a rehearsal shows that there was less memory than planned for, or that a plan takes more than it said, plan
    for a share of it. The last failure is the user's.

    Raises:
        BudgetTooSmall, torch.OutOfMemoryError: the batch fits at no levels.
    """
    for share in SHARES_OF_A_PLAN:
        try:
            _rehearse(run, step, batch)
            return
        except torch.OutOfMemoryError:
            logger.warning("pronghorn: memory ran out in the rehearsal of this plan: once more with less")
        # Here, where the error no longer keeps the failed pass's tensors alive.
        gc.collect()
        torch.cuda.empty_cache()
        found = _plan(run, int(found.estimate.reserved * share), batch)
    _rehearse(run, step, batch)


def _plan(run: RunMemory, budget: str | int, batch: Batch) -> Plan:
    found = run.plan(budget, batch)
    logger.warning(
        "pronghorn: memory plan for %.2f GiB: %s (%s); %.2f GiB expected for %d tokens",
        found.budget / 2**30,
        found.counts(),
        "; ".join(found.reasons),
        found.estimate.reserved / 2**30,
        batch.tokens,
    )
    return found


def _less_than_planned(
    trainer: Any, budget: str | int, found: Plan, error: torch.OutOfMemoryError
) -> OutOfMemory:
    memory, first_line = gpu_memory(trainer.args.device), str(error).partition("\n")[0]
    return OutOfMemory(
        f"memory_budget={budget}: the plan needs {found.estimate.reserved / 2**30:.2f} GiB, but this process can have "
        f"{memory.within_reach / 2**30:.2f} of the GPU's {memory.total / 2**30:.2f} GiB ({first_line})",
        fix='set memory_budget="auto", or end what else uses the GPU',
    )


def _rehearse(run: RunMemory, step: TrainingStep | None, batch: Batch) -> None:
    if step is not None:
        run.rehearse(step, batch)
