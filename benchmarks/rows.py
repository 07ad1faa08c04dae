"""Rows of token ids, the same for every side: a pure function of the workload and the seed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from benchmarks.models import FIRST_TOKEN

UNSUPERVISED = -100


@dataclass(frozen=True)
class Distribution:
    """Log-normal lengths: exp(N(log median, spread²)), at least `shortest` tokens. `prompt` and `prompt_spread` are
    of the unsupervised beginning; a row without one is supervised from its second token on."""

    median: float
    spread: float
    shortest: int
    prompt: float = 0.0
    prompt_spread: float = 0.0

    @property
    def mean(self) -> float:
        """Of the log-normal; cutting at the longest row and at `shortest` moves it by less than a percent."""
        return self.median * math.exp(self.spread**2 / 2)

    def draw(self, generator: random.Random, longest: int) -> int:
        drawn = generator.lognormvariate(math.log(self.median), self.spread)
        return max(min(self.shortest, longest), min(longest, round(drawn)))

    def draw_prompt(self, generator: random.Random, length: int) -> int:
        """Tokens of the prompt; a quarter of the row at least is supervised."""
        if not self.prompt:
            return 0
        drawn = generator.lognormvariate(math.log(self.prompt), self.prompt_spread)
        return min(round(drawn), length - max(1, length // 4))


DISTRIBUTIONS = {
    "mixed": Distribution(median=110, spread=0.75, shortest=16),
    # Alpaca's prompt and response: median 90 tokens, mean 130, 95th percentile 370. Its prompt is mostly a template.
    "alpaca": Distribution(median=90, spread=0.857, shortest=12, prompt=45, prompt_spread=0.4),
}


def token_rows(
    count: int, length: int, vocabulary: int, *, lengths: str = "fixed", seed: int = 0
) -> list[list[int]]:
    """`count` rows of random ids in [FIRST_TOKEN, vocabulary), all `length` long or of a distribution up to it.

    Ids come from a quarter of the vocabulary, so that there is something to learn and the loss falls.
    """
    generator = random.Random(seed)
    last = FIRST_TOKEN + max(1, (vocabulary - FIRST_TOKEN) // 4)
    ids = range(FIRST_TOKEN, last)
    sizes = DISTRIBUTIONS.get(lengths)
    return [
        generator.choices(ids, k=length if sizes is None else sizes.draw(generator, length))
        for _ in range(count)
    ]


def columns(
    count: int, length: int, vocabulary: int, *, lengths: str = "fixed", seed: int = 0
) -> dict[str, list]:
    """A data set's columns: `input_ids`, and `labels` where a part of the rows is not supervised."""
    rows = token_rows(count, length, vocabulary, lengths=lengths, seed=seed)
    sizes = DISTRIBUTIONS.get(lengths)
    if sizes is None or not sizes.prompt:
        return {"input_ids": rows}
    generator = random.Random(seed + 1)
    prompts = [sizes.draw_prompt(generator, len(row)) for row in rows]
    labels = [[UNSUPERVISED] * n + row[n:] for n, row in zip(prompts, rows, strict=True)]
    return {"input_ids": rows, "labels": labels}
