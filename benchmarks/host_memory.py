"""Host memory that layers' tensors wait in between forward and backward: what there is, and what a side wants of it."""

from __future__ import annotations

from typing import Any

from benchmarks.libraries import Job, Loaded

GIB = 1 << 30


def available() -> str:
    """What there is, in a sentence."""
    from pronghorn.memory import HOST_SHARE, available_host_bytes

    free = available_host_bytes()
    return f"{free / GIB:.1f} GiB of host memory are available; pronghorn pins {HOST_SHARE:.0%} of it at most"


def wanted(job: Job, loaded: Loaded, length: int) -> str:
    """What a row of so many tokens is expected to want, before it is trained."""
    if job.side.library == "pronghorn":
        return _wanted_by_plan(job, loaded.model, length)
    if job.side.checkpointing == "unsloth":
        config = loaded.model.config
        size = config.num_hidden_layers * config.hidden_size * 2 * length
        return f"about {size / GIB:.2f} GiB of host memory, for the input of each layer in 16 bits"
    return "no host memory: nothing waits there"


def _wanted_by_plan(job: Job, model: Any, length: int) -> str:
    """pronghorn's levels as they are set, or those that a plan for the budget would set."""
    import torch

    from pronghorn.engine import AUTO, binding_of
    from pronghorn.engine.planning import device_limits, host_bytes, shape_of
    from pronghorn.errors import BudgetTooSmall
    from pronghorn.memory import Batch, plan

    binding = binding_of(model)
    if binding is None or not binding.bound:
        return "nothing is known: the model takes its stock forward"
    budget = job.side.train.get("memory_budget")
    if budget is None and not binding.automatic:
        return (
            f"{host_bytes(binding, length) / GIB:.2f} GiB of pinned host memory, at the levels that are set"
        )
    if not torch.cuda.is_available():
        return "no pinned host memory: there is no GPU"
    limits = device_limits(binding, budget or AUTO)
    try:
        found = plan(
            shape_of(binding),
            limits.budget,
            Batch(length, length),
            rates=limits.rates,
            host_limit=limits.host,
        )
    except BudgetTooSmall as error:
        return f"more than there is: {error}"
    return f"{found.estimate.host / GIB:.2f} GiB of pinned host memory, by a plan of {found.counts()}"
