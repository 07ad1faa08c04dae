"""One request on its way: its tokens, the blocks that hold its keys and values, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field

from pronghorn.inference.paging import BLOCK_TOKENS, BlockPool, Parent
from pronghorn.inference.requests import Request


@dataclass(eq=False)
class Sequence:
    """A request with the tokens so far.

    Args:
        id: the request's number; earlier requests have smaller ones.
        seed: of its random numbers.
    """

    id: int
    request: Request
    seed: int
    tokens: list[int]
    stops: frozenset[int]
    #: more tokens that the repetition penalty counts as seen
    also_seen: tuple[int, ...] = ()
    #: tokens whose keys and values are in the cache
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    #: its row in the decoding batch, or None while it waits
    slot: int | None = None
    #: the slot of what recurrent layers remember of it, from its first prefill on
    state: int | None = None
    #: decoding steps that are launched and whose tokens are not read yet
    in_flight: int = 0
    #: blocks that are published or found, and the parent of the next
    _shared: int = 0
    _parent: Parent = None

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def left(self) -> int:
        """How many more tokens may be launched."""
        return self.request.sampling.max_new_tokens - self.generated - self.in_flight

    @property
    def length(self) -> int:
        """Tokens, those in flight included."""
        return len(self.tokens) + self.in_flight

    def find_shared(self, pool: BlockPool, is_long: bool = False) -> None:
        """Take over published blocks that hold the beginning; at least the last token is left to compute. Of a waiting
        sequence; `is_long`: its keys are rotated as those of long contexts are."""
        self._parent = ("begin", self.request.adapter, is_long)
        while (end := (len(self.blocks) + 1) * BLOCK_TOKENS) < len(self.tokens):
            block = pool.find(self._parent, self.tokens[end - BLOCK_TOKENS : end])
            if block is None:
                break
            self.blocks.append(block)
            self._parent = pool.serial(block)
            self._shared += 1
            self.cached = end

    def grow(self, pool: BlockPool, length: int) -> bool:
        """Hold blocks for `length` tokens; False, and none taken, where there are not enough."""
        missing = -(-length // BLOCK_TOKENS) - len(self.blocks)
        if missing > pool.free:
            return False
        for _ in range(missing):
            block = pool.take()
            assert block is not None
            self.blocks.append(block)
        return True

    def publish(self, pool: BlockPool) -> None:
        """Offer blocks that have become full."""
        if not pool.sharing:
            return
        known = min(self.cached, len(self.tokens))
        while (end := (self._shared + 1) * BLOCK_TOKENS) <= known:
            tokens = self.tokens[end - BLOCK_TOKENS : end]
            self._parent = pool.publish(self.blocks[self._shared], self._parent, tokens)
            self._shared += 1

    def release(self, pool: BlockPool) -> None:
        """Let all blocks go; what they held has to be computed, or found, again."""
        for block in reversed(self.blocks):
            pool.give_back(block)
        self.blocks.clear()
        self.cached = self._shared = 0
