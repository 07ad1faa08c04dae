"""Pairs become tokens once, and batches of micro-batches for a step, with what the loss has to know about them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pronghorn.embedding.rows import Pair
from pronghorn.embedding.tokens import tokenize
from pronghorn.embedding.vectors import Batcher


@dataclass(frozen=True)
class TokenPair:
    """A pair as tokens. `keys` are numbers of its texts (anchor, positive, negatives): equal ones are the same text."""

    texts: tuple[np.ndarray, ...]
    keys: tuple[int, ...]
    score: float | None


def tokenize_pairs(
    pairs: Sequence[Pair],
    tokenizer: Any,
    max_length: int | None,
    query_prompt: str,
    document_prompt: str,
) -> list[TokenPair]:
    """Every text is tokenised once, with its side's prompt in front."""
    places: dict[tuple[str, str], int] = {}
    keys: dict[str, int] = {}

    def place(prompt: str, text: str) -> int:
        keys.setdefault(text, len(keys))
        return places.setdefault((prompt, text), len(places))

    numbers = [
        (
            place(query_prompt, pair.anchor),
            *(place(document_prompt, t) for t in (pair.positive, *pair.negatives)),
        )
        for pair in pairs
    ]
    ids = tokenize(tokenizer, [prompt + text for prompt, text in places], max_length)
    return [
        TokenPair(
            tuple(ids[number] for number in row),
            tuple(keys[text] for text in (pair.anchor, pair.positive, *pair.negatives)),
            pair.score,
        )
        for pair, row in zip(pairs, numbers, strict=True)
    ]


@dataclass
class PairCollator:
    """Makes the batch of a step: `parts`, batches of `Batcher` with at most `texts_of_part` texts each (None: all);
    `order`, where each of the parts' texts stands among anchors, positives, negatives; and `facts` for the loss."""

    batcher: Batcher
    texts_of_part: int | None = None

    def __call__(self, rows: Sequence[TokenPair]) -> dict[str, Any]:
        texts = texts_of(rows)
        order = list(range(len(texts)))
        # Texts of like lengths together: rows with padding have less of it.
        if self.texts_of_part is not None:
            order.sort(key=lambda index: len(texts[index]))
        parts = [self.batcher([texts[i] for i in part]) for part in _in_parts(order, self.texts_of_part)]
        places = torch.empty(len(order), dtype=torch.int64)
        places[torch.tensor(order)] = torch.arange(len(order))
        return {
            "parts": parts,
            "places": places,
            "facts": facts_of(rows),
            "tokens": sum(len(text) for text in texts),
        }


def texts_of(rows: Sequence[TokenPair]) -> list[np.ndarray]:
    """The texts of a batch as losses take their vectors: anchors of all rows, positives, negatives."""
    sides = [row.texts[side] for side in (0, 1) for row in rows]
    return sides + [text for row in rows for text in row.texts[2:]]


def facts_of(rows: Sequence[TokenPair]) -> dict[str, Any]:
    """What a loss has to know of a batch besides vectors.

    `excluded` bool [n, n + m]: candidates, positives of all rows and then negatives, that must not count against an
    anchor: another row's positive that is its own positive's text, that some row says belongs to it, or that is the
    anchor's own text. `owners` int64 [m]: the row of each negative. `scores` fp32 [n] or None. `rows`: n.
    """
    belong: defaultdict[int, set[int]] = defaultdict(set)
    for row in rows:
        belong[row.keys[0]] |= {row.keys[0], row.keys[1]}
    candidates = np.array([row.keys[1] for row in rows] + [key for row in rows for key in row.keys[2:]])
    excluded = np.stack([np.isin(candidates, list(belong[row.keys[0]])) for row in rows])
    np.fill_diagonal(excluded, False)
    owners = [index for index, row in enumerate(rows) for _ in row.keys[2:]]
    scores = [row.score for row in rows]
    return {
        "rows": len(rows),
        "excluded": torch.from_numpy(excluded),
        "owners": torch.tensor(owners, dtype=torch.int64),
        "scores": None if None in scores else torch.tensor(scores, dtype=torch.float32),
    }


def _in_parts(order: Sequence[int], size: int | None) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), size or len(order)):
        yield order[start : start + (size or len(order))]
