"""One row times weights in 16 bits on a CPU: by oneDNN or by torch's own loop, whichever is faster on this machine.

Such a product is bound by reading the weight. torch gives it to oneDNN, which reads SmolLM2-135M's weights at 15 GB/s
on two cores of an AMD EPYC with bf16 instructions; torch's own loop reads them at 30 GB/s there and is as exact (18.3
and 9.0 ms a token; sums in another order round one number in 8,000 the other way). From four rows on oneDNN is the
faster one. Other processors may differ, so both are tried on a model's own weight, for some hundredths of a second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

#: bytes of a weight that is tried, and how often
TRIED_BYTES, TRIES = 64 * 2**20, 5


class _Switch:
    """torch's own switch for oneDNN, off while somebody is inside; steps may run in several threads."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, True

    @contextmanager
    def off(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._before = bool(torch.backends.mkldnn.enabled)
                torch.backends.mkldnn.enabled = False
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    torch.backends.mkldnn.enabled = self._before


_ONEDNN = _Switch()
without_onednn = _ONEDNN.off


def is_faster_without_onednn(weight: Tensor | None) -> bool:
    """Whether torch's own loop multiplies one row faster with rows of a weight [out, in] like this one."""
    if weight is None or weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    rows = weight.detach()[: max(1, TRIED_BYTES // (weight.shape[1] * weight.element_size()))]
    x = rows[:1].clone()
    with without_onednn():
        own = _seconds(x, rows)
    return own < _seconds(x, rows)


def _seconds(x: Tensor, weight: Tensor) -> float:
    """The fastest of several products."""
    taken = []
    with torch.no_grad():
        for _ in range(TRIES):
            began = time.perf_counter()
            F.linear(x, weight)
            taken.append(time.perf_counter() - began)
    return min(taken)
