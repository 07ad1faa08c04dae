"""Blocks of the key/value cache: who holds which, and which can be shared.

A block holds the keys and values of `BLOCK_TOKENS` consecutive tokens of one sequence, in every layer. A full block is
published under its tokens and the block before it (and, for the first, what all of its keys depend on: the adapter),
so a later sequence that begins with the same tokens takes it over instead of computing it again. Blocks that nobody
holds keep what they hold until their room is needed, the longest unused first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from heapq import heapify, heappop, heappush

BLOCK_TOKENS = 64

#: what precedes a block: the serial number of the one before it, or for the first whatever its keys depend on
Parent = Hashable
Key = tuple[Parent, tuple[int, ...]]


class BlockPool:
    """`count` blocks with their holders counted.

    Args:
        sharing: publish full blocks; without it every sequence computes its own.
    """

    def __init__(self, count: int, sharing: bool = True) -> None:
        self.count, self.sharing = count, sharing
        self._empty = list(
            range(count)
        )  # a heap: neighbours in a sequence are neighbours in memory where possible
        self._unused: OrderedDict[int, None] = OrderedDict()  # published, held by nobody; oldest first
        self._holders = [0] * count
        self._published: dict[Key, int] = {}
        self._key: dict[int, Key] = {}
        self._serial: dict[int, int] = {}
        self._next_serial = 0

    @property
    def free(self) -> int:
        """Blocks that `take` can give."""
        return len(self._empty) + len(self._unused)

    def take(self) -> int | None:
        """A block for new keys, held by the caller; None when all are held."""
        if self._empty:
            block = heappop(self._empty)
        elif self._unused:
            block, _ = self._unused.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._holders[block] = 1
        return block

    def give_back(self, block: int) -> None:
        """Let go of a block."""
        self._holders[block] -= 1
        if self._holders[block]:
            return
        if block in self._key:
            self._unused[block] = None
        else:
            heappush(self._empty, block)

    def find(self, parent: Parent, tokens: Sequence[int]) -> int | None:
        """A published block with these tokens after `parent`, now held by the caller, too; or None."""
        block = self._published.get((parent, tuple(tokens)))
        if block is None:
            return None
        self._unused.pop(block, None)
        self._holders[block] += 1
        return block

    def publish(self, block: int, parent: Parent, tokens: Sequence[int]) -> Parent:
        """Offer a full block to others; gives what its successor's parent is.

        Where another block with the same content is published already, that one stays so, and its successors are
        found under its number.
        """
        if not self.sharing:
            return None
        key = (parent, tuple(tokens))
        known = self._published.setdefault(key, block)
        if known == block and block not in self._key:
            self._key[block] = key
            self._serial[block] = self._next_serial
            self._next_serial += 1
        return self._serial[known]

    def serial(self, block: int) -> Parent:
        """What stands for a published block as the parent of the next."""
        return self._serial[block]

    def forget_all(self) -> None:
        """Publish nothing that is there now: the weights have changed."""
        for block in list(self._key):
            self._forget(block)
        self._empty += list(self._unused)
        heapify(self._empty)
        self._unused.clear()

    def _forget(self, block: int) -> None:
        del self._published[self._key.pop(block)]
        del self._serial[block]
