"""Static shapes for batches of varying size, so that a captured step meets few different ones.

A batch is padded with documents that nobody learns from: their tokens carry no label and nothing attends to them.
Budgets are coarse where padding is cheap (documents, the longest document, rows of the loss) and fine where it costs
(tokens: eight sizes from one power of two to the next, 6 % of padding on average; none for rows packed to one length).
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: Tokens are counted in these: what matrix tiles are made of.
GRAIN = 128


def power_of_two(count: int) -> int:
    """The smallest power of two that holds `count`."""
    return 1 << max(count - 1, 0).bit_length()


def token_budget(tokens: int) -> int:
    """Tokens rounded up to a sixteenth of the power of two above, at least to a multiple of `GRAIN`."""
    step = max(GRAIN, power_of_two(tokens) // 16)
    return -(-tokens // step) * step


def row_budget(rows: int, tokens: int) -> int:
    """Rows of the loss rounded up to a quarter of the tokens."""
    step = max(tokens // 4, 1)
    return min(max(-(-rows // step), 1) * step, tokens)


@dataclass
class Budgets:
    """Rounds a batch's sizes up. Documents and the longest document only grow over a run: they cost nearly nothing,
    while every new combination of sizes is another graph.

    Args:
        limit: tokens of the largest batch (rows a batch · their length), which needs no rounding beyond; None: unknown.
    """

    limit: int | None = None
    _documents: int = field(default=1, repr=False)
    _longest: int = field(default=1, repr=False)

    def tokens(self, count: int) -> int:
        """T of a batch of `count` real tokens."""
        budget = token_budget(count)
        return budget if self.limit is None or count > self.limit else min(budget, max(self.limit, count))

    def padding(self, count: int, longest: int) -> list[int]:
        """Lengths of the documents that fill a batch of `count` tokens up, none longer than the longest so far."""
        missing, longest = self.tokens(count) - count, max(longest, self._longest)
        lengths = [longest] * (missing // longest)
        return lengths + ([missing % longest] if missing % longest else [])

    def documents(self, count: int) -> int:
        """How many documents a batch of `count` is given; the last ones are empty."""
        self._documents = max(self._documents, power_of_two(count))
        return self._documents

    def longest(self, length: int, tokens: int) -> int:
        """What a batch of T tokens calls its longest document."""
        self._longest = max(self._longest, power_of_two(length))
        return max(min(self._longest, tokens), length)
