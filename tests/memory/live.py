"""Bytes of storages that are alive on the CPU, counted operation by operation."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pronghorn.memory.allocator import Allocator


class LiveBytes(TorchDispatchMode):
    """Counts storages that operations make while it is entered: `live` now, `peak` at most, neither with what was
    there before. Temporary storages inside an operation are not seen.

    Args:
        memory: gets every allocation in its order, too.
    """

    def __init__(self, memory: Allocator | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.memory = memory
        self._known: dict[int, tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self._key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self._key(tensor) not in given:
                self._add(tensor)
        return result

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = (size, -1 if self.memory is None else self.memory.new(size))
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        size, handle = self._known.pop(key, (0, -1))
        self.live -= size
        if self.memory is not None:
            self.memory.free(handle)


def peak_of(step: Callable[[], Any]) -> int:
    """The most bytes alive at once that `step` made."""
    with LiveBytes() as counter:
        step()
    return counter.peak
