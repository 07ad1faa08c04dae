"""The device bytes of what layers park on the host, as `memory.offload.HostStash` moves them."""

from __future__ import annotations

from collections import deque

from pronghorn.memory.allocator import Allocator
from pronghorn.memory.offload import bytes_in_flight, comes_late
from pronghorn.memory.pool import aligned
from pronghorn.memory.products import Held, Products
from pronghorn.memory.shape import ModelShape

#: The order in which a layer's tensors come back: that of the blocks' saves, of every kind of attention, then of MLP.
_ORDER = (
    "x", "out", "lse", "gate_of_output", "q", "kv", "heads_q", "k", "v", "qkv", "z", "b", "a",
    "xa_inputs", "xa_qkv", "xa_codes", "xa_q_up", "xa_kv_up", "xa_o", "projected_attention",
    "summed", "logits", "gate", "up", "gate_up", "xa_gate_up", "xa_down", "projected_glu",
)  # fmt: skip


def _place(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


class Parking(Products):
    """What `layers` layers keep, and where that is."""

    def __init__(
        self, shape: ModelShape, tokens: int, memory: Allocator, tile_rows: int, layers: int
    ) -> None:
        super().__init__(shape, tokens, memory, tile_rows)
        self.kept: list[Held] = [{} for _ in range(layers)]
        self._leaving: deque[tuple[int, int, list[int]]] = deque()
        self._in_flight = 0
        self._back: dict[int, Held] = {}
        self._parked: dict[int, dict[str, int]] = {}

    def _park(self, index: int, kept: Held) -> None:
        """`HostStash.park`: device memory stays until the copies of a later layer begin."""
        self._parked[index] = {name: kept[name][1] for name in sorted(kept, key=_place)}
        size = self._parked_bytes(index)
        handles = [handle for handle, _ in kept.values()]
        self._leaving.append((index, size, handles))
        self.kept[index] = kept
        self._in_flight = max(self._in_flight, bytes_in_flight(size, aligned(self._residual())))
        while sum(size for _, size, _ in self._leaving) > self._in_flight:
            left, _, gone = self._leaving.popleft()
            self._free(*gone)
            self.kept[left] = {}

    def _fetch(self, index: int) -> Held:
        saves = self._not_left(index)
        if saves is None:
            self._start_return(index)
            saves = self._back.pop(index)
        below = index - 1
        if below in self._parked and not comes_late(self._parked_bytes(below), aligned(self._residual())):
            self._start_return(below)
        return saves

    def _parked_bytes(self, index: int) -> int:
        return sum(map(aligned, self._parked[index].values()))

    def _not_left(self, index: int) -> Held | None:
        for item in self._leaving:
            if item[0] == index:
                self._leaving.remove(item)
                return self.kept[index]
        return None

    def _start_return(self, index: int) -> None:
        if (
            index in self._back
            or index not in self._parked
            or any(item[0] == index for item in self._leaving)
        ):
            return
        self._back[index] = {name: (self._new(size), size) for name, size in self._parked[index].items()}
