"""The same training with Transformers, PEFT and TRL as they come: what it takes, for comparison.

TRL turns gradient checkpointing on, so a layer keeps its input, and its forward runs twice. The constants below are
fitted to the runs in benchmarks/results (H200; Transformers 5.17, PEFT 0.21, TRL 1.15), four workloads in all;
`python -m benchmarks.plan_error` prints what is left of an error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pronghorn.memory import Batch, Gpu, ModelShape, Rates
from pronghorn.memory.cost import head_time, layer_times
from pronghorn.memory.estimate import LIBRARY_BYTES, OTHER_LIBRARY_BYTES
from pronghorn.tuning.breakdown import CONTEXT_BYTES
from pronghorn.tuning.planner import Job, micro_batches

#: Bytes for a token and a unit of the widest layer that are live while a layer is computed again and back, of 16-bit
#: and of 4-bit weights.
LIVE = {False: 28, True: 19}
#: Bytes for the same that a layer's three passes move beyond what the roofline of the fused layer counts: norms and
#: adapters in fp32, one kernel an operation.
MOVED = 390
#: The host's Python for a layer's three passes in 16 and in 4 bits: a step takes no less.
HOST_SECONDS = {False: 6.7e-3, True: 8.6e-3}


@dataclass(frozen=True)
class StockSetting:
    """A job's fastest micro-batch in the stock libraries, and what it takes."""

    job: Job
    precision: str
    micro_batch: int
    accumulation: int
    peak: int
    seconds: float
    label: str = "with gradient checkpointing, TRL's default"

    @property
    def tokens_per_second(self) -> float:
        return self.accumulation * self.micro_batch * self.job.workload.tokens / self.seconds

    @property
    def total_seconds(self) -> float | None:
        return None if self.job.steps is None else self.job.steps * self.seconds


def stock_settings(job: Job, gpu: Gpu, budget: int) -> list[StockSetting]:
    """The fastest micro-batch of 16-bit and of 4-bit weights that fits; none for one of them where none does."""
    found = []
    for precision, storage in (("16-bit", "16-bit"), ("4-bit", "nf4 double")):
        shape, best = job.shape(gpu, storage), None
        for sequences in micro_batches(job):
            largest = job.largest(sequences)
            reserved = stock_bytes(shape, largest, gpu.rates)
            if reserved > budget:
                break
            padded = round(sequences * job.workload.tokens / (1 - job.workload.padding))
            usual = replace(job.usual(sequences), tokens=min(padded, largest.tokens))
            accumulation = max(job.global_batch // sequences, 1)
            seconds = accumulation * stock_seconds(shape, usual, gpu.rates)
            one = StockSetting(job, precision, sequences, accumulation, reserved + CONTEXT_BYTES, seconds)
            best = one if best is None or one.seconds < best.seconds else best
        if best is not None:
            found.append(best)
    return found


def stock_bytes(shape: ModelShape, batch: Batch, rates: Rates) -> int:
    """What torch reserves for a micro-batch of adapters training."""
    weights = sum(shape.weight_tensors())
    # Parameters, gradients and two states in fp32.
    trained = shape.adapter_parameters * 16
    inputs = shape.layers * batch.tokens * shape.hidden * shape.element
    live = batch.tokens * shape.intermediate * LIVE[shape.storage.startswith("nf4")]
    library = LIBRARY_BYTES.get(rates.capability[0], OTHER_LIBRARY_BYTES)
    return weights + trained + inputs + live + library


def stock_seconds(shape: ModelShape, batch: Batch, rates: Rates) -> float:
    """A micro-batch forward and backward."""
    times = layer_times(replace(shape, attention="flash"), batch, rates)
    moved = batch.tokens * shape.intermediate * MOVED / rates.bandwidth
    layer = max(times.forward * 2 + times.backward + moved, HOST_SECONDS[shape.storage.startswith("nf4")])
    return shape.layers * layer + head_time(shape, batch, rates)
