"""The settings that fit a GPU and are fastest: precision, micro-batch, accumulation, save levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from pronghorn.blocks import Level
from pronghorn.data.budgets import token_budget
from pronghorn.engine.planning import plan_with_expanded, shape_of_config
from pronghorn.errors import BudgetTooSmall
from pronghorn.kernels.glu_products import RANKS
from pronghorn.memory import (
    GPUS,
    Batch,
    Estimate,
    Gpu,
    ModelShape,
    Plan,
    longest_that_fits,
    parse_budget,
    plan_if_it_fits,
)
from pronghorn.memory.gpus import GIB
from pronghorn.memory.plan import gib, leanest, smallest_budget, with_margin
from pronghorn.tuning.breakdown import CONTEXT_BYTES, Part, parts_of
from pronghorn.tuning.roofline import micro_batch_seconds, optimizer_seconds
from pronghorn.tuning.workload import Workload

PRECISIONS = ("16-bit", "int8", "4-bit")
#: What is rounded beyond the stock model's computing.
LABELS = {
    "16-bit": "exact",
    "int8": "quantised: weights and products in 8 bits",
    "4-bit": "quantised: weights in 4 bits (NF4)",
}
#: How much faster int8 must be than 16 bits to be chosen where both fit: it rounds, if little.
WORTH_ROUNDING = 1.05
#: How much faster a doubled micro-batch must be able to be, that it is looked at.
WORTH_DOUBLING = 1.02
#: Changes that are named where nothing fits.
WAYS = 3
#: Sequences of an optimizer step, where nobody said.
GLOBAL_BATCH = 16

ShapeOf = Callable[[Gpu, str], ModelShape]


@dataclass(frozen=True)
class Job:
    """What is wanted: a model with adapters of a rank (0: all weights), on a workload.

    Args:
        config: the model's Transformers config.
        global_batch: sequences of an optimizer step.
        epochs: passes over the data.
        offload: whether host memory may be used; host_limit: most of it, None for any.
        micro_batch: sequences of a micro-batch, None for what is fastest.
    """

    config: Any
    workload: Workload
    rank: int = 16
    global_batch: int = GLOBAL_BATCH
    epochs: float = 1.0
    offload: bool = True
    host_limit: int | None = None
    micro_batch: int | None = None

    def shape(self, gpu: Gpu, storage: str) -> ModelShape:
        """The model's sizes with its linear weights stored in one way, as this GPU runs it."""
        return shape_of_config(
            self.config,
            rank=self.rank,
            storage=gpu.dtype if storage == "16-bit" else storage,
            dtype=gpu.dtype,
            attention="cudnn" if gpu.capability[0] == 9 else "flash",
            trained="adapters" if self.rank else "all",
            joined=storage.startswith("int8"),
            unit_in_products=gpu.capability == (9, 0)
            and self.rank in RANKS
            and not getattr(self.config, "mlp_bias", False),
        )

    @property
    def adapter_parameters(self) -> int:
        return shape_of_config(self.config, rank=self.rank).adapter_parameters

    def largest(self, sequences: int) -> Batch:
        """The batch that memory has to hold: full sequences whose tokens all count."""
        tokens = sequences * self.workload.length
        return Batch(tokens, tokens, sequences)

    def usual(self, sequences: int) -> Batch:
        """An average batch, rounded up as the collator does."""
        work = self.workload
        tokens = min(token_budget(math.ceil(sequences * work.tokens)), sequences * work.length)
        rows = max(round(tokens * work.supervised), 1)
        return Batch(tokens, rows, max(round(sequences * work.documents), 1))

    @property
    def steps(self) -> int | None:
        """Optimizer steps in all."""
        if self.workload.sequences is None:
            return None
        return max(math.ceil(self.workload.sequences * self.epochs / self.global_batch), 1)


@dataclass(frozen=True)
class Setting:
    """One way to run a job on a GPU, and what it is predicted to take.

    Args:
        micro_batch, accumulation: sequences of a micro-batch, micro-batches of an optimizer step.
        seconds: of an optimizer step. tokens: of it, without padding.
    """

    job: Job
    gpu: Gpu
    precision: str
    shape: ModelShape
    plan: Plan
    micro_batch: int
    accumulation: int
    seconds: float
    tokens: float

    @property
    def label(self) -> str:
        return LABELS[self.precision]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def total_seconds(self) -> float | None:
        return None if self.job.steps is None else self.job.steps * self.seconds

    @property
    def parts(self) -> tuple[Part, ...]:
        """The peak's memory by cause."""
        return parts_of(self.shape, self.plan.levels, self.plan.batch, self.plan.estimate)

    @property
    def peak(self) -> int:
        """Bytes in use on the GPU at the peak, the CUDA context included."""
        return self.plan.estimate.reserved + CONTEXT_BYTES


def storages(precision: str, gpu: Gpu, rank: int) -> tuple[str, ...]:
    """How linear weights can be stored for a precision; none where the GPU or full fine-tuning has no such mode."""
    if precision == "16-bit":
        return ("16-bit",)
    if not rank or (precision == "int8" and not gpu.int8):
        return ()
    return ("int8 two", "int8") if precision == "int8" else ("nf4 double",)


def settings(
    job: Job, gpu: Gpu, budget: int | None = None, precisions: Sequence[str] = PRECISIONS
) -> list[Setting]:
    """The fastest setting of each precision that fits, in the order of `PRECISIONS`.

    Args:
        budget: bytes that torch may reserve; None for all that the GPU has, less a headroom.
    """
    budget = budget or budget_of(gpu)
    found = []
    for precision in precisions:
        ways = [
            setting
            for storage in storages(precision, gpu, job.rank)
            if (setting := _fastest(job, gpu, budget, precision, storage)) is not None
        ]
        if ways:
            found.append(max(ways, key=lambda setting: setting.tokens_per_second))
    return found


def choose(found: Sequence[Setting]) -> Setting:
    """What to take of several precisions: 16 bits, or int8 where it was measured and is clearly faster; else 4 bits."""
    by_precision = {setting.precision: setting for setting in found}
    exact, int8 = by_precision.get("16-bit"), by_precision.get("int8")
    if int8 is None or not (measured_int8(int8.gpu) or len(found) == 1):
        return exact or by_precision["4-bit"]
    if exact is None or int8.tokens_per_second > WORTH_ROUNDING * exact.tokens_per_second:
        return int8
    return exact


def measured_int8(gpu: Gpu) -> bool:
    """Whether int8 training ran on this generation; its kernels are written for others, too, but nobody measured."""
    return gpu.capability[0] == 9


def budget_of(gpu: Gpu) -> int:
    """Bytes that torch may reserve on a GPU that nobody else uses."""
    return parse_budget("auto", int(gpu.memory * GIB))


def _fastest(job: Job, gpu: Gpu, budget: int, precision: str, storage: str) -> Setting | None:
    """Micro-batches are doubled while that fits and pays."""
    best: Setting | None = None
    for sequences in micro_batches(job):
        if best and _at_most(job, gpu, storage, sequences) < WORTH_DOUBLING * best.tokens_per_second:
            break
        setting = _setting(job, gpu, budget, precision, storage, sequences)
        if setting is None or (best and setting.tokens_per_second <= best.tokens_per_second):
            break
        best = setting
    return best


def _at_most(job: Job, gpu: Gpu, storage: str, sequences: int) -> float:
    """Tokens per second if memory were no matter, for which nothing has to be searched."""
    # With room, 4-bit weights are kept as 16-bit ones.
    shape = job.shape(gpu, "16-bit" if storage.startswith("nf4") else storage)
    usual = job.usual(sequences)
    everything: list[Level] = ["all"] * shape.layers
    seconds = micro_batch_seconds(shape, everything, usual, gpu.rates)
    return min(sequences * job.workload.tokens, usual.tokens) / seconds


def micro_batches(job: Job) -> Iterator[int]:
    """Sequences of a micro-batch that are tried: powers of two that divide the step's, or the one that is asked for."""
    if job.micro_batch is not None:
        yield job.micro_batch
        return
    sequences = 1
    while sequences <= job.global_batch:
        if job.global_batch % sequences == 0:
            yield sequences
        sequences *= 2


def _setting(job: Job, gpu: Gpu, budget: int, precision: str, storage: str, sequences: int) -> Setting | None:
    shape, batch, rates = job.shape(gpu, storage), job.largest(sequences), gpu.rates
    found = plan_if_it_fits(shape, budget, batch, rates=rates, host_limit=job.host_limit, offload=job.offload)
    if found is None:
        return None
    computed = shape
    host = job.host_limit if job.offload else 0
    kept = plan_with_expanded(shape, budget, batch, rates, budget if host is None else host)
    if kept is not None and kept.time.total < found.time.total:
        found, computed = kept, replace(shape, storage=shape.multiplied)
    accumulation = max(job.global_batch // sequences, 1)
    usual = job.usual(sequences)
    seconds = accumulation * micro_batch_seconds(computed, found.levels, usual, rates, found.tile_rows)
    tokens = accumulation * min(sequences * job.workload.tokens, usual.tokens)
    return Setting(
        job=job,
        gpu=gpu,
        precision=precision,
        shape=shape,
        plan=found,
        micro_batch=sequences,
        accumulation=accumulation,
        seconds=seconds + optimizer_seconds(shape, rates),
        tokens=tokens,
    )


def does_not_fit(
    job: Job, gpu: Gpu, budget: int | None = None, precisions: Sequence[str] = PRECISIONS
) -> BudgetTooSmall:
    """The error for a job that fits at no setting: what the leanest takes, and the smallest changes that help."""
    budget = budget or budget_of(gpu)
    sequences = job.micro_batch or 1
    batch = job.largest(sequences)
    leanest_of: dict[str, tuple[Estimate, str]] = {}
    for precision in precisions:
        for storage in storages(precision, gpu, job.rank):
            found = leanest(job.shape(gpu, storage), batch, gpu.rates, job.offload)
            if precision not in leanest_of or found.reserved < leanest_of[precision][0].reserved:
                leanest_of[precision] = found, storage
    if not leanest_of:
        weights = " or ".join(precisions)
        return BudgetTooSmall(
            f"{gpu.name} has no units for {weights} weights", fix="choose another precision, or leave it open"
        )
    precision = min(leanest_of, key=lambda name: leanest_of[name][0].reserved)
    least, storage = leanest_of[precision]
    of_rows = f"{sequences} x {job.workload.length:,} tokens"
    need = with_margin(least.reserved, job.shape(gpu, storage))
    # Less than the GPU has was asked for, which is then what to change.
    asked = budget < budget_of(gpu)
    there = f"the budget is {gib(budget)}" if asked else f"{gpu.name} has {gib(budget)} for it"
    return BudgetTooSmall(
        f"{precision} weights and a micro-batch of {of_rows} take {gib(need)} at least, and {there}",
        fix=", or ".join(islice(_ways_to_fit(job, gpu, budget, precisions, storage, need), WAYS)),
    )


def _ways_to_fit(
    job: Job, gpu: Gpu, budget: int, precisions: Sequence[str], storage: str, least: int
) -> Iterator[str]:
    """Changes that make it fit, the smallest first."""
    sequences = job.micro_batch or 1
    if sequences > 1:
        fewer = smallest_budget(job.shape(gpu, storage), job.largest(1), gpu.rates, job.offload)
        if fewer <= budget:
            yield f"micro-batches of 1 row, which take {gib(fewer)}"
    for precision in PRECISIONS[1:]:
        for other in () if precision in precisions else storages(precision, gpu, job.rank):
            size = smallest_budget(job.shape(gpu, other), job.largest(sequences), gpu.rates, job.offload)
            if size <= budget:
                yield f"{precision} weights, which take {gib(size)}"
                break
    longest = longest_that_fits(
        job.shape(gpu, storage), budget, job.largest(1), gpu.rates, job.offload, job.host_limit
    )
    if longest:
        yield f"rows of at most {longest:,} tokens (--max-seq-length {longest})"
    if job.rank > 1:
        smaller = _largest_rank(job, gpu, budget, storage)
        if smaller:
            yield f"adapters of rank {smaller} (--rank {smaller})"
    if not job.rank:
        with_adapters = replace(job, rank=16).shape(gpu, "16-bit")
        size = smallest_budget(with_adapters, job.largest(1), gpu.rates, job.offload)
        yield f"adapters of rank 16 instead of all weights, which take {gib(size)}" + (
            "" if size <= budget else " (too much here as well)"
        )
    if budget < least <= budget_of(gpu):
        yield f"a budget of {gib(least)} (--budget)"
        return
    larger = [other for other in GPUS if budget_of(other) >= least and other.memory > gpu.memory]
    if larger:
        next_larger = min(larger, key=lambda one: one.memory)
        yield f"a GPU with {gib(least)} to spare, such as {next_larger.name} ({next_larger.memory:g} GiB)"
    else:
        yield f"{gib(least)} of memory, which no listed GPU has: several GPUs"


def _largest_rank(job: Job, gpu: Gpu, budget: int, storage: str) -> int:
    """The largest smaller rank that fits, a power of two; 0 for none."""
    rank = 1 << (job.rank - 1).bit_length() - 1
    while rank:
        smaller = replace(job, rank=rank)
        batch = smaller.largest(job.micro_batch or 1)
        if smallest_budget(smaller.shape(gpu, storage), batch, gpu.rates, job.offload) <= budget:
            return rank
        rank //= 2
    return 0
