"""Memory of a trial: what it took, and what the largest one is predicted to take before several run side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pronghorn.engine import binding_of
from pronghorn.engine.planning import shape_of
from pronghorn.memory import Batch, available_host_bytes, rates_of
from pronghorn.memory.plan import leanest
from pronghorn.training.memory import largest_batch
from pronghorn.training.progress import memory_now_bytes
from pronghorn.tuning.breakdown import CONTEXT_BYTES

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The most memory since this was made: reserved on the GPU, or the process's own where Linux tells it.

    Args:
        elsewhere: bytes of the weights in another process's memory, which are counted, too.
    """

    def __init__(self, elsewhere: int = 0) -> None:
        self._elsewhere = elsewhere
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):
                _CLEAR.write_text("5")  # the kernel's way to begin anew with VmHWM

    def read(self) -> int | None:
        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_reserved()) + self._elsewhere
        if not _CLEAR.exists():
            return None
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None


@dataclass(frozen=True)
class Footprint:
    """Bytes that a worker takes at least, as predicted, and that there are for all workers.

    Args:
        by_batch: for the largest trial with each micro-batch, the largest last.
    """

    by_batch: Mapping[int, int]
    available: int

    @property
    def needed(self) -> int:
        """For the largest trial."""
        return max(self.by_batch.values())


def footprint(trainer: Any, micro_batches: Sequence[int]) -> Footprint | None:
    """Of a trainer whose adapter is the largest; None where the engine does not run the model, whose memory is not
    known then."""
    binding, found = binding_of(trainer.model), largest_batch(trainer)
    if binding is None or not binding.bound or found is None:
        return None
    shape, longest = shape_of(binding), found.tokens // found.documents
    batches = {rows: Batch(longest * rows, longest * rows, rows) for rows in sorted(micro_batches)}
    if torch.cuda.is_available():
        rates = rates_of(torch.cuda.get_device_name())
        needed = {rows: leanest(shape, batch, rates).reserved for rows, batch in batches.items()}
        total = torch.cuda.mem_get_info()[1]
        return Footprint({rows: size + CONTEXT_BYTES for rows, size in needed.items()}, total)
    now = memory_now_bytes(False)
    least = {rows: leanest(shape, batch, rates_of("H200"), offload=False) for rows, batch in batches.items()}
    needed = {rows: now + one.reserved - one.weights for rows, one in least.items()}
    return Footprint(needed, now + available_host_bytes())
