"""The largest batch of a run: planned for, rehearsed before the first step, and what is done when memory runs out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from pronghorn.data.budgets import power_of_two
from pronghorn.engine import AUTO, Binding, TrainingStep, binding_of
from pronghorn.engine.planning import levels_without_gpu, plan_levels, shape_of, vision_bytes
from pronghorn.errors import BudgetInvalid, OutOfMemory
from pronghorn.memory import Batch, Plan, available_host_bytes, estimate

logger = logging.getLogger("pronghorn")

#: of a plan whose rehearsal ran out of memory, the shares that are planned for next
SHARES_OF_WHAT_WAS_FREE = (0.9, 0.75)


@dataclass(frozen=True)
class Memory:
    """A GPU's memory in bytes: all of it, free, and what this process has reserved."""

    total: int
    free: int
    reserved: int

    @property
    def others(self) -> int:
        """What neither is free nor this process's."""
        return max(self.total - self.free - self.reserved, 0)

    @property
    def within_reach(self) -> int:
        """What this process can have at most."""
        return self.free + self.reserved


def memory_now(device: torch.device) -> Memory:
    free, total = torch.cuda.mem_get_info(device)
    return Memory(total, free, torch.cuda.memory_reserved(device))


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


def take_memory(trainer: Any, step: TrainingStep | None) -> None:
    """Plan the save levels where the run has a `memory_budget` or nobody chose any, and on a GPU rehearse the largest
    batch before anything is trained.

    Args:
        step: what rehearses; None where the run's steps are the trainer's ordinary ones.

    Raises:
        BudgetTooSmall: the batch fits at no levels; with numbers and the smallest change that helps.
        BudgetInvalid: a budget that is no size, or one for a run whose largest batch is not known.
        OutOfMemory: the GPU has less than the budget says, because others use it.
    """
    binding, batch, budget = binding_of(trainer.model), largest_batch(trainer), trainer.args.memory_budget
    if binding is None or not binding.bound:
        return
    if trainer.args.device.type != "cuda":
        if budget is not None:
            logger.warning("pronghorn: memory_budget=%s is for a GPU's memory and has no effect here", budget)
        if binding.automatic and batch is not None:
            binding.use_plan(
                [levels_without_gpu(binding, batch, available_host_bytes())] * len(binding.layers), None
            )
        return
    if batch is None:
        if budget is not None:
            raise BudgetInvalid(
                "memory_budget needs to know the longest row, and the data is a stream without max_length",
                fix="set max_length",
            )
        return
    if budget is not None and budget != AUTO:
        expected = _plan(binding, budget, batch)
        try:
            _rehearse(trainer, step, batch)
        except torch.OutOfMemoryError as error:
            raise _less_than_planned(trainer, budget, expected, error) from None
    elif budget is None and not binding.automatic:
        try:
            _rehearse(trainer, step, batch)
        except torch.OutOfMemoryError:
            logger.warning("pronghorn: the largest batch (%d tokens) does not fit as set", batch.tokens)
            _plan_what_is_free(trainer, binding, step, batch)
    else:
        _plan_what_is_free(trainer, binding, step, batch)


def _plan_what_is_free(trainer: Any, binding: Binding, step: TrainingStep | None, batch: Batch) -> None:
    """Levels for all the memory there is; where a rehearsal shows that it was less, for a share of it. The last failure
    is the user's.

    Raises:
        BudgetTooSmall, torch.OutOfMemoryError: the batch fits at no levels.
    """
    torch.cuda.empty_cache()
    found = _plan(binding, AUTO, batch)
    for share in SHARES_OF_WHAT_WAS_FREE:
        try:
            _rehearse(trainer, step, batch)
            return
        except torch.OutOfMemoryError:
            logger.warning("pronghorn: memory ran out in the rehearsal of this plan: once more with less")
        # Here, where the error no longer keeps the failed pass's tensors alive.
        torch.cuda.empty_cache()
        found = _plan(binding, int(found.estimate.reserved * share), batch)
    _rehearse(trainer, step, batch)


def _plan(binding: Binding, budget: str | int, batch: Batch) -> Plan:
    found = plan_levels(binding, budget, batch)
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
    memory, first_line = memory_now(trainer.args.device), str(error).partition("\n")[0]
    return OutOfMemory(
        f"memory_budget={budget}: the plan needs {found.estimate.reserved / 2**30:.2f} GiB, but this process can have "
        f"{memory.within_reach / 2**30:.2f} of the GPU's {memory.total / 2**30:.2f} GiB ({first_line})",
        fix='set memory_budget="auto", or end what else uses the GPU',
    )


def _rehearse(trainer: Any, step: TrainingStep | None, batch: Batch) -> None:
    if step is None:
        return
    longest = batch.tokens // trainer.args.per_device_train_batch_size
    documents = power_of_two(batch.documents)
    step.rehearse(batch.tokens, batch.loss_rows, documents, min(power_of_two(longest), batch.tokens))
