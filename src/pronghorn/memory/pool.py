"""Pinned host memory that outlives the passes that use it.

Passes park tensors and take them back in the opposite order, so the pool is a stack of bytes over a growing list of
chunks: a pass of the same shapes gets the same addresses again (what a captured pass needs), and one of other shapes
leaves no holes. Chunks are powers of two, so that small passes of many sizes take few.

Reuse needs no event: every copy out of and into the pool runs on one side stream, whose order puts the copy that
brings a tensor back before the copy that overwrites its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pronghorn.memory.host import available_host_bytes, pinned

#: Chunks grow with the pool between these sizes.
SMALLEST_CHUNK, LARGEST_CHUNK = 16 * 2**20, 256 * 2**20
#: Pieces begin at multiples of this, for full-speed copies.
ALIGNMENT = 512
#: Of the host memory that is available, pinned memory takes at most this share: it cannot be swapped out.
HOST_SHARE = 0.75


class HostPool:
    """A stack of pinned bytes. `take` in the order of parking; `give_back` in any order, freed from the top.

    Args:
        limit: most bytes it may pin; None means `HOST_SHARE` of what is available when it first grows.
        allocate: makes pinned uint8 tensors of some sizes; tests give another one.
    """

    def __init__(
        self, limit: int | None = None, allocate: Callable[[Sequence[int]], list[Tensor]] = pinned
    ) -> None:
        self.limit = limit
        self._allocate = allocate
        self._chunks: list[Tensor] = []
        self._starts: list[int] = []
        self._size = 0
        self._top = 0
        self._live: dict[int, int] = {}

    @property
    def pinned_bytes(self) -> int:
        return self._size

    @property
    def used_bytes(self) -> int:
        return self._top

    def reserve(self, size: int) -> str | None:
        """Make sure that `size` bytes fit from the bottom up; returns the reason where they may not."""
        if self.limit is None:
            self.limit = int(available_host_bytes() * HOST_SHARE)
        sizes: list[int] = []
        while self._size + sum(sizes) < size:
            missing = size - self._size - sum(sizes)
            sizes.append(min(max(_power_of_two(missing), SMALLEST_CHUNK), LARGEST_CHUNK))
        if not sizes:
            return None
        if self._size + sum(sizes) > self.limit:
            return (
                f"{_gib(size)} of pinned host memory are needed and {_gib(self.limit)} may be taken "
                f"({HOST_SHARE:.0%} of what was available)"
            )
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return "pinned host memory cannot be allocated during a capture; run the same shape once before"
        try:
            chunks = self._allocate(sizes)
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            return f"the system refuses to pin {_gib(sum(sizes))} more of host memory: {why}"
        for chunk in chunks:
            self._chunks.append(chunk)
            self._starts.append(self._size)
            self._size += chunk.numel()
        return None

    def take(self, size: int) -> tuple[int, list[Tensor]] | str:
        """(start, pieces): `size` bytes on top of the stack, cut where chunks end. A text says why there are none."""
        start = aligned(self._top)
        refused = self.reserve(start + size)
        if refused is not None:
            return refused
        self._top = start + size
        self._live[start] = self._top
        return start, self._pieces(start, size)

    def give_back(self, start: int) -> None:
        """The bytes from `start` are free for the next pass once the ones above them are."""
        del self._live[start]
        self._top = max(self._live.values(), default=0)

    def _pieces(self, start: int, size: int) -> list[Tensor]:
        pieces = []
        for begin, chunk in zip(self._starts, self._chunks, strict=True):
            low, high = max(start, begin), min(start + size, begin + chunk.numel())
            if low < high:
                pieces.append(chunk[low - begin : high - begin])
        return pieces


def aligned(size: int) -> int:
    """The first place behind so many bytes at which a piece may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
