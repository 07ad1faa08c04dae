"""The largest batch of a run: planned for, rehearsed before the first step, and what is done when memory runs out."""

from __future__ import annotations

import logging
from typing import Any

import torch

from pronghorn.data.budgets import power_of_two
from pronghorn.engine import TrainingStep, binding_of
from pronghorn.engine.planning import plan_levels
from pronghorn.errors import BudgetInvalid
from pronghorn.memory import Batch

logger = logging.getLogger("pronghorn")


def largest_batch(trainer: Any) -> Batch | None:
    """The most tokens a micro-batch of the run can have, with as many rows of the loss; None when it is not known."""
    args = trainer.args
    longest = _longest_row(trainer.train_dataset)
    limits = [int(length) for length in (args.max_length, longest) if length is not None]
    if not limits:
        return None
    tokens = min(limits) * args.per_device_train_batch_size
    return Batch(tokens, tokens, args.per_device_train_batch_size)


def _longest_row(dataset: Any) -> int | None:
    """Tokens of the longest row, where the data set can be asked cheaply."""
    table = getattr(dataset, "data", None)
    if table is None or "input_ids" not in getattr(dataset, "column_names", ()):
        return None
    import pyarrow.compute as pc

    lengths = pc.list_value_length(table.column("input_ids"))
    return pc.max(lengths).as_py()  # type: ignore[no-any-return, attr-defined]


def take_memory(trainer: Any, step: TrainingStep) -> None:
    """Plan the save levels for `memory_budget`, and rehearse the largest batch on a GPU before anything is trained.

    Without a budget, a batch that does not fit at the levels set before is planned for with all that is free.

    Raises:
        BudgetTooSmall: the batch fits at no levels; with numbers and the smallest change that helps.
        BudgetInvalid: a budget that is no size, or one for a run whose largest batch is not known.
    """
    batch, budget = largest_batch(trainer), trainer.args.memory_budget
    if trainer.args.device.type != "cuda":
        if budget is not None:
            logger.warning("pronghorn: memory_budget=%s is for a GPU's memory and has no effect here", budget)
        return
    if budget is not None and batch is None:
        raise BudgetInvalid(
            "memory_budget needs to know the longest row, and the data is a stream without max_length",
            fix="set max_length",
        )
    if budget is not None and batch is not None:
        _plan(trainer, budget, batch)
    if batch is None:
        return
    try:
        _rehearse(trainer, step, batch)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        if budget is not None and budget != "auto":
            raise
        logger.warning("pronghorn: the largest batch (%d tokens) does not fit as set", batch.tokens)
        _plan(trainer, "auto", batch)
        _rehearse(trainer, step, batch)


def _plan(trainer: Any, budget: str | int, batch: Batch) -> None:
    binding = binding_of(trainer.model)
    assert binding is not None
    found = plan_levels(binding, budget, batch)
    logger.warning(
        "pronghorn: memory plan for %.2f GiB: %s; %.2f GiB expected for %d tokens",
        found.budget / 2**30,
        found.counts(),
        found.estimate.reserved / 2**30,
        batch.tokens,
    )


def _rehearse(trainer: Any, step: TrainingStep, batch: Batch) -> None:
    longest = batch.tokens // trainer.args.per_device_train_batch_size
    documents = power_of_two(batch.documents)
    step.rehearse(batch.tokens, batch.loss_rows, documents, min(power_of_two(longest), batch.tokens))
