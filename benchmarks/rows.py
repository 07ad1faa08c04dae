"""Rows of token ids, the same for every side: a pure function of the workload and the seed."""

from __future__ import annotations

import math
import random

from benchmarks.models import FIRST_TOKEN

#: instruction data (Alpaca): log-normal lengths
MEDIAN_LENGTH, SPREAD, SHORTEST = 110, 0.75, 16


def token_rows(
    count: int, length: int, vocabulary: int, *, mixed: bool = False, seed: int = 0
) -> list[list[int]]:
    """`count` rows of random ids in [FIRST_TOKEN, vocabulary); all `length` long, or of `mixed` lengths up to it.

    Ids come from a quarter of the vocabulary, so that there is something to learn and the loss falls.
    """
    generator = random.Random(seed)
    last = FIRST_TOKEN + max(1, (vocabulary - FIRST_TOKEN) // 4)
    ids = range(FIRST_TOKEN, last)
    return [
        generator.choices(ids, k=_mixed_length(generator, length) if mixed else length) for _ in range(count)
    ]


def _mixed_length(generator: random.Random, longest: int) -> int:
    drawn = generator.lognormvariate(math.log(MEDIAN_LENGTH), SPREAD)
    return max(SHORTEST, min(longest, round(drawn)))
