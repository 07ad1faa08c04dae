"""A model of torch's caching allocator on a GPU: what a sequence of allocations reserves.

Rules (c10/cuda/CUDACachingAllocator): sizes round up to 512 bytes; up to 1 MiB they come from 2 MiB segments, up to
10 MiB from 20 MiB segments, above from segments of their own rounded to 2 MiB. A request takes the smallest free block
that fits, lowest address first, and cuts off what is left over (from large blocks only beyond 1 MiB); freed blocks join
their free neighbours. Segments stay reserved.
"""

from __future__ import annotations

from bisect import bisect_left, insort

KIB, MIB = 2**10, 2**20
SMALL = MIB
SMALL_SEGMENT, MEDIUM_SEGMENT, LARGEST_MEDIUM = 2 * MIB, 20 * MIB, 10 * MIB
ROUNDING = 512


def whole_segment(size: int) -> int:
    """Bytes of a segment of its own for a large block."""
    return -(-size // SMALL_SEGMENT) * SMALL_SEGMENT


class _Block:
    __slots__ = ("address", "after", "before", "free", "size", "small")

    def __init__(self, address: int, size: int, small: bool) -> None:
        self.address, self.size, self.small, self.free = address, size, small, False
        self.before: _Block | None = None
        self.after: _Block | None = None


class Allocator:
    """Bytes allocated and reserved, now and at most, over calls of `new` and `free`."""

    def __init__(self) -> None:
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._next_address = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._at: dict[int, _Block] = {}

    def new(self, size: int) -> int:
        """Allocate; returns a handle for `free`. An empty tensor takes nothing."""
        if size <= 0:
            return -1
        size = -(-size // ROUNDING) * ROUNDING
        small = size <= SMALL
        block = self._take(size, small)
        left = block.size - size
        if left >= (ROUNDING if small else SMALL + 1):
            self._split(block, size)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block.address

    def free(self, *handles: int) -> None:
        """Give blocks back."""
        for handle in handles:
            if handle < 0:
                continue
            block = self._at[handle]
            assert not block.free, "freed twice"
            self.allocated -= block.size
            block.free = True
            for neighbour in (block.after, block.before):
                if neighbour is not None and neighbour.free:
                    self._unlist(neighbour)
                    block = self._join(block, neighbour)
            insort(self._free[block.small], (block.size, block.address))

    def reserve(self, size: int) -> None:
        """What is held so far is `size` bytes, as somebody has asked; nothing more fits into its holes."""
        self.reserved = self.peak_reserved = size
        self._free = {True: [], False: []}

    def reset_peaks(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def _take(self, size: int, small: bool) -> _Block:
        free = self._free[small]
        at = bisect_left(free, (size, -1))
        if at < len(free):
            _, address = free.pop(at)
            return self._at[address]
        if small:
            segment = SMALL_SEGMENT
        elif size < LARGEST_MEDIUM:
            segment = MEDIUM_SEGMENT
        else:
            segment = whole_segment(size)
        block = _Block(self._next_address, segment, small)
        # Segments never touch: blocks of different segments do not join.
        self._next_address += segment + 1
        self._at[block.address] = block
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(block.address + size, block.size - size, block.small)
        rest.free, rest.before, rest.after = True, block, block.after
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        self._at[rest.address] = rest
        insort(self._free[rest.small], (rest.size, rest.address))

    def _join(self, block: _Block, neighbour: _Block) -> _Block:
        first, second = (block, neighbour) if block.address < neighbour.address else (neighbour, block)
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        first.free = True
        del self._at[second.address]
        return first

    def _unlist(self, block: _Block) -> None:
        free = self._free[block.small]
        free.pop(bisect_left(free, (block.size, block.address)))


class GrowingAllocator(Allocator):
    """Large blocks come from one segment that grows at its end: what it comes to is the piece that holds a sequence of
    allocations without another."""

    def __init__(self) -> None:
        super().__init__()
        self.piece = 0
        self._last: _Block | None = None

    def _take(self, size: int, small: bool) -> _Block:
        free, last = self._free[small], self._last
        if small or bisect_left(free, (size, -1)) < len(free):
            return super()._take(size, small)
        there = last.size if last is not None and last.free else 0
        grown = whole_segment(size - there)
        if last is not None and last.free:
            self._unlist(last)
            block = last
            block.size += grown
        else:
            # Above all segments of small blocks, whose addresses grow from 0 on.
            block = _Block((1 << 50) + self.piece, grown, small)
            self._at[block.address] = block
            block.before, self._last = last, block
            if last is not None:
                last.after = block
        self.piece += grown
        self.reserved += grown
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _split(self, block: _Block, size: int) -> None:
        super()._split(block, size)
        if block is self._last:
            self._last = block.after

    def _join(self, block: _Block, neighbour: _Block) -> _Block:
        joined = super()._join(block, neighbour)
        if self._last in (block, neighbour):
            self._last = joined
        return joined
