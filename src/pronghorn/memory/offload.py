"""What layers keep, parked in pinned host memory between forward and backward.

One forward pass of a decoder fills a stash layer by layer; backward empties it in the opposite order. Both copies run
on a stream of their own: out while the next layers compute, back in while the layer above is differentiated. A
layer's input is [T, H]: 64 MiB for 8,192 tokens of an 8B model, 1.2 ms over a 55 GB/s link against about 12 ms that
such a layer computes forward and backward; with the attention block's tensors it is 293 MiB, 5.6 ms.

Memory is given back in stream order, not by events: the host runs many layers ahead of the GPU, and blocks that wait
for an event of the side stream would all be new ones meanwhile (8B: 21 of 32 inputs alive at once). Instead the
computing stream waits for a copy that was started a layer or two ago, after which the block is its own again.

A pass can be captured into a CUDA graph: the side stream forks from the computing one by events, nothing is queried or
synchronised, host memory comes from a `HostPool` that an eager pass of the same shapes (or `reserve`) filled before,
and after the last `fetch`, or `join`, the computing stream has waited for everything the side stream was given.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pronghorn.memory.pool import HostPool, aligned

logger = logging.getLogger("pronghorn")

#: Layers that park their input alone and whose copies may still run when the next layer begins. With one, that layer
#: would wait for the link.
LAG = 2
#: Bytes of an input (131,072 tokens of an 8B model) from which on a layer that parks nothing else has its copy alone on
#: the way out, and comes back when it is asked for: the copy takes 1 % of the layer's time there, and each further
#: input on the device a tenth of what such a step needs.
LARGE_INPUT = 2**30


def comes_late(size: int, first: int) -> bool:
    """Whether a layer that parks `size` bytes, of which `first` are its input, comes back only when it is asked for."""
    return LARGE_INPUT <= first == size


def bytes_in_flight(size: int, first: int) -> int:
    """Bytes that may still be on their way out when the next layer begins, for layers that park `size` bytes of which
    `first` are the layer's input: one list and one input. Longer lists hold as much memory as several inputs."""
    return size if comes_late(size, first) else size + (LAG - 1) * first


@dataclass(frozen=True)
class _View:
    """A tensor as a part of the bytes that are parked: which of them, and where in there."""

    unit: int
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    def of(self, units: Sequence[Tensor]) -> Tensor:
        unit = units[self.unit]
        tensor = torch.empty(0, dtype=self.dtype, device=unit.device)
        return tensor.set_(unit.untyped_storage(), self.offset, self.size, self.stride)


@dataclass
class _Parked:
    """One layer's tensors: their place on the host, and their bytes on the device once they are on their way back."""

    sizes: list[int]
    views: list[_View]
    late: bool
    start: int = -1
    pieces: list[Tensor] = field(default_factory=list)
    stayed: list[Tensor] | None = None
    here: list[Tensor] | None = None
    arrived: torch.cuda.Event | None = None


@dataclass
class _Leaving:
    """Tensors whose copy to the host has been started."""

    index: int
    tensors: list[Tensor]
    size: int
    copied: torch.cuda.Event


class HostStash:
    """A stack of parked lists of tensors. `park` in forward order; `fetch` by the index that `park` gave, last first.

    Args:
        stream: the side stream for copies; one per device serves all passes.
        pool: pinned memory, one per side stream, kept over passes.
        tell: takes the reason why something stays on the device after all.
    """

    def __init__(
        self,
        stream: torch.cuda.Stream,
        pool: HostPool | None = None,
        tell: Callable[[str], None] = logger.warning,
    ) -> None:
        self._stream = stream
        self._pool = HostPool() if pool is None else pool
        self._tell = tell
        self._parked: list[_Parked | None] = []
        self._leaving: deque[_Leaving] = deque()
        self._in_flight = 0
        self._computing: torch.cuda.Stream | None = None

    def park(self, tensors: Sequence[Tensor]) -> int:
        """Start copying one layer's tensors to the host; their device memory is free for reuse a layer or two later.

        Where the host has no room for them they stay on the device.
        """
        computing = self._computing = torch.cuda.current_stream(tensors[0].device)
        units, views = _units(tensors)
        index, size, first = len(self._parked), sum(map(_stride, units)), _stride(units[0])
        item = _Parked([unit.numel() for unit in units], views, comes_late(size, first))
        self._parked.append(item)
        taken = self._pool.take(size)
        if isinstance(taken, str):
            self._tell(f"layers keep on the GPU what should wait in host memory: {taken}")
            item.stayed = list(tensors)
            return index
        item.start, item.pieces = taken
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            for host, device in _matching(item.pieces, units):
                host.copy_(device, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        self._leaving.append(_Leaving(index, [*tensors, *units], size, copied))
        self._in_flight = max(self._in_flight, bytes_in_flight(size, first))
        while sum(leaving.size for leaving in self._leaving) > self._in_flight:
            computing.wait_event(self._leaving.popleft().copied)
        return index

    def fetch(self, index: int, device: torch.device) -> list[Tensor]:
        """The parked tensors on their device again; starts bringing back those parked before them,
        but for those that come late."""
        computing = torch.cuda.current_stream(device)
        item = self._parked[index]
        assert item is not None
        tensors = item.stayed if item.stayed is not None else self._not_left(index, computing)
        if tensors is None:
            self._start_return(index, computing, device)
            assert item.here is not None and item.arrived is not None
            # From here on the blocks belong to the computing stream alone.
            computing.wait_event(item.arrived)
            tensors = [view.of(item.here) for view in item.views]
        self._parked[index] = None
        if item.start >= 0:
            self._pool.give_back(item.start)
        below = self._parked[index - 1] if index > 0 else None
        if below is not None and not below.late:
            self._start_return(index - 1, computing, device)
        return tensors

    def join(self, device: torch.device) -> None:
        """Make the computing stream wait for all copies that were started: where a capture ends before `fetch` has
        brought everything back."""
        computing = torch.cuda.current_stream(device)
        for leaving in self._leaving:
            computing.wait_event(leaving.copied)
        for item in self._parked:
            if item is not None and item.arrived is not None:
                computing.wait_event(item.arrived)

    def _not_left(self, index: int, computing: torch.cuda.Stream) -> list[Tensor] | None:
        """The originals, where they have not left the device yet."""
        for leaving in self._leaving:
            if leaving.index == index:
                self._leaving.remove(leaving)
                computing.wait_event(leaving.copied)
                return leaving.tensors[: len(self._parked[index].views)]  # type: ignore[union-attr]
        return None

    def _start_return(self, index: int, computing: torch.cuda.Stream, device: torch.device) -> None:
        item = self._parked[index]
        if (
            item is None
            or item.here is not None
            or item.stayed is not None
            or any(leaving.index == index for leaving in self._leaving)
        ):
            return
        # Allocated on the computing stream, so that the blocks come from and return to that stream's pool; what that
        # stream did with them before comes first.
        item.here = [torch.empty(size, dtype=torch.uint8, device=device) for size in item.sizes]
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            for host, there in _matching(item.pieces, item.here):
                there.copy_(host, non_blocking=True)
            item.arrived = torch.cuda.Event()
            item.arrived.record(self._stream)

    def __del__(self) -> None:
        """A pass without a full backward: copies may be under way into blocks that are about to be free."""
        if self._computing is None:
            return
        if self._leaving or any(item is not None and item.arrived is not None for item in self._parked):
            # The blocks belong to the pool of the stream that computed, whichever thread collects this object.
            self._computing.wait_stream(self._stream)
        for item in self._parked:
            if item is not None and item.start >= 0:
                self._pool.give_back(item.start)


def _units(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[_View]]:
    """The bytes to park (one uint8 vector a storage) and where each tensor lies in them.

    Tensors that share a storage (q, k and v of one product) travel together as they lie; one that is a small part of
    its storage is copied out first.
    """
    used: dict[int, int] = {}
    for tensor in tensors:
        key = tensor.untyped_storage()._cdata
        used[key] = used.get(key, 0) + tensor.numel() * tensor.element_size()
    units: list[Tensor] = []
    places: dict[int, int] = {}
    views = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if 4 * used[storage._cdata] < 3 * storage.nbytes():
            tensor = tensor.contiguous() if not tensor.is_contiguous() else tensor.clone()
            storage = tensor.untyped_storage()
        if storage._cdata not in places:
            places[storage._cdata] = len(units)
            units.append(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
        place = places[storage._cdata]
        views.append(_View(place, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()))
    return units, views


def _stride(unit: Tensor) -> int:
    """Bytes from a unit's beginning to the next one's."""
    return aligned(unit.numel() * unit.element_size())


def _matching(pieces: list[Tensor], tensors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of byte ranges (host, device) of equal length: tensors one after another, cut where host pieces end."""
    pairs = []
    remaining = deque(pieces)
    for tensor in tensors:
        flat = tensor.view(-1).view(torch.uint8)
        skip = _stride(tensor) - flat.numel()
        while flat.numel():
            piece = remaining.popleft()
            length = min(piece.numel(), flat.numel())
            pairs.append((piece[:length], flat[:length]))
            flat = flat[length:]
            if length < piece.numel():
                remaining.appendleft(piece[length:])
        while skip and remaining:
            piece = remaining.popleft()
            if skip < piece.numel():
                remaining.appendleft(piece[skip:])
            skip -= min(skip, piece.numel())
    return pairs
