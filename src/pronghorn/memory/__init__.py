"""Where kept activations live, what a step takes, and the plan for a budget. (Save levels themselves are `blocks`'.)"""

from pronghorn.memory.cost import step_time
from pronghorn.memory.estimate import Estimate, Inner, estimate
from pronghorn.memory.gpus import GPUS, Gpu, Rates, gpu_of, rates_of
from pronghorn.memory.host import HostMemory, available_host_bytes, host_memory, pinned
from pronghorn.memory.offload import HostStash
from pronghorn.memory.parts import DeltaShape, LatentShape, MixtureShape
from pronghorn.memory.plan import (
    Plan,
    gib,
    longest_that_fits,
    parse_budget,
    plan,
    plan_if_it_fits,
    with_margin,
    without_margin,
)
from pronghorn.memory.pool import HOST_SHARE, HostPool
from pronghorn.memory.schedule import Batch
from pronghorn.memory.shape import PROJECTIONS, ModelShape

__all__ = [
    "GPUS",
    "HOST_SHARE",
    "PROJECTIONS",
    "Batch",
    "DeltaShape",
    "Estimate",
    "Gpu",
    "HostMemory",
    "HostPool",
    "HostStash",
    "Inner",
    "LatentShape",
    "MixtureShape",
    "ModelShape",
    "Plan",
    "Rates",
    "available_host_bytes",
    "estimate",
    "gib",
    "gpu_of",
    "host_memory",
    "longest_that_fits",
    "parse_budget",
    "pinned",
    "plan",
    "plan_if_it_fits",
    "rates_of",
    "step_time",
    "with_margin",
    "without_margin",
]
