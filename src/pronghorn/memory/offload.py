"""Layer inputs parked in pinned host memory between forward and backward.

One forward pass of a decoder fills a stash layer by layer; backward empties it in the opposite order. Both copies run
on a stream of their own: out while the next layers compute, back in while the layer above is differentiated. A
layer's input is [T, H]: 64 MiB for 8,192 tokens of an 8B model, 1.2 ms over a 55 GB/s link against about 12 ms that
such a layer computes forward and backward.

Memory is given back in stream order, not by events: the host runs many layers ahead of the GPU, and blocks that wait
for an event of the side stream would all be new ones meanwhile (8B: 21 of 32 inputs alive at once). Instead the
computing stream waits for a copy that was started `LAG` layers ago, after which the block is its own again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

#: Inputs still on the device while their copies run. With one, the next layer would wait for the link.
LAG = 2


@dataclass
class _Slot:
    """One parked tensor: its host copy, and its device copy once it is on its way back."""

    host: Tensor
    device: Tensor | None = None
    returned: torch.cuda.Event | None = None


class HostStash:
    """A stack of parked tensors. `park` in forward order; `fetch` by the index that `park` gave, last first.

    Args:
        stream: the side stream for copies; one per device serves all passes.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._slots: list[_Slot | None] = []
        self._leaving: deque[tuple[int, Tensor, torch.cuda.Event]] = deque()
        self._computing: torch.cuda.Stream | None = None

    def park(self, x: Tensor) -> int:
        """Start copying x to the host; its device memory is free for reuse `LAG` calls later."""
        computing = self._computing = torch.cuda.current_stream(x.device)
        # torch caches pinned blocks, so steady-state steps allocate nothing here.
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            host.copy_(x, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        index = len(self._slots)
        self._slots.append(_Slot(host))
        self._leaving.append((index, x, copied))
        if len(self._leaving) > LAG:
            computing.wait_event(self._leaving.popleft()[2])
        return index

    def fetch(self, index: int, device: torch.device) -> Tensor:
        """The parked tensor on its device again; starts bringing back the one parked before it."""
        computing = torch.cuda.current_stream(device)
        x = self._still_here(index, computing)
        if x is None:
            self._start_return(index, computing, device)
            slot = self._slots[index]
            assert slot is not None and slot.device is not None and slot.returned is not None
            # From here on the block belongs to the computing stream alone.
            computing.wait_event(slot.returned)
            x = slot.device
        self._slots[index] = None
        if index > 0:
            self._start_return(index - 1, computing, device)
        return x

    def _still_here(self, index: int, computing: torch.cuda.Stream) -> Tensor | None:
        """The original, where it has not left the device yet."""
        for item in self._leaving:
            if item[0] == index:
                self._leaving.remove(item)
                computing.wait_event(item[2])
                return item[1]
        return None

    def _start_return(self, index: int, computing: torch.cuda.Stream, device: torch.device) -> None:
        slot = self._slots[index]
        if slot is None or slot.device is not None or any(item[0] == index for item in self._leaving):
            return
        # Allocated on the computing stream, so that the block comes from and returns to that stream's pool; what that
        # stream did with the block before comes first.
        slot.device = torch.empty(slot.host.shape, dtype=slot.host.dtype, device=device)
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            slot.device.copy_(slot.host, non_blocking=True)
            slot.returned = torch.cuda.Event()
            slot.returned.record(self._stream)

    def __del__(self) -> None:
        """A pass without a full backward: copies may be under way into blocks that are about to be free."""
        if self._computing is None:
            return
        if self._leaving or any(slot is not None and slot.device is not None for slot in self._slots):
            # The blocks belong to the pool of the stream that computed, whichever thread collects this object.
            self._computing.wait_stream(self._stream)
