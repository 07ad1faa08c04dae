"""Rows that ask the same: exactly, or with nearly the same words."""

from __future__ import annotations

import math
import re
from collections import defaultdict

from pronghorn.data.synthesis.words import content_words

#: Questions with at least this share of their words in common (Jaccard) are one.
SIMILAR = 0.8


class Asked:
    """The questions so far."""

    def __init__(self) -> None:
        self._exact: set[str] = set()
        self._words: list[frozenset[str]] = []
        self._by_word: defaultdict[str, list[int]] = defaultdict(list)

    def add(self, question: str) -> str | None:
        """Remember a question; 'duplicate' or 'near duplicate' where it was asked before."""
        plain = re.sub(r"\W+", " ", question).strip().casefold()
        if plain in self._exact:
            return "duplicate"
        self._exact.add(plain)
        words = frozenset(content_words(question))
        # Two sets with this share in common have one of their first few words in common, in any fixed order.
        first = sorted(words)[: len(words) - math.ceil(SIMILAR * len(words)) + 1]
        seen = {i for word in first for i in self._by_word[word]}
        if any(len(words & self._words[i]) >= SIMILAR * len(words | self._words[i]) for i in seen):
            return "near duplicate"
        for word in first:
            self._by_word[word].append(len(self._words))
        self._words.append(words)
        return None
