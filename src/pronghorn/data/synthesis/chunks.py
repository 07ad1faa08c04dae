"""Documents cut into chunks of so many tokens, with an overlap, at the ends of paragraphs and sentences."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pronghorn.data.synthesis.documents import Document

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[^a-z])|(?<=[。！？])")


@dataclass(frozen=True)
class Chunk:
    """A piece of a document, under the headings that it begins under.

    Args:
        number: from 1, in its document.
        overlap: characters at its beginning that the chunk before has, too.
    """

    document: str
    number: int
    headings: tuple[str, ...]
    text: str
    overlap: int = 0

    @property
    def shown(self) -> str:
        """The text under its headings, as a model reads it."""
        return f"{' > '.join(self.headings)}\n\n{self.text}" if self.headings else self.text


def cut(
    document: Document,
    count_tokens: Callable[[str], int],
    size: int = 400,
    overlap: int = 40,
    least: int = 24,
) -> list[Chunk]:
    """Chunks of at most `size` tokens. A new heading begins a new chunk once there is half a chunk.

    Args:
        overlap: tokens of the chunk before that are repeated, in whole sentences, under the same headings.
        least: a chunk with fewer tokens says too little and is left out.
    """
    chunks: list[Chunk] = []
    current = _Building(count_tokens, size, overlap)
    for section in document.sections:
        if current.headings != section.headings:
            if current.tokens >= size // 2 or not _nested(current.headings, section.headings):
                current.close(document.name, chunks, least)
            current.enter(section.headings)
        for piece in _pieces(section.text, count_tokens, size):
            if current.tokens and current.tokens + piece[1] > size:
                current.close(document.name, chunks, least, keep=True)
            current.add(*piece)
    current.close(document.name, chunks, least)
    return chunks


def _nested(outer: tuple[str, ...], inner: tuple[str, ...]) -> bool:
    """Whether two places of a document lie under one title, so that a chunk may hold both."""
    return bool(outer) and bool(inner) and outer[0] == inner[0]


class _Building:
    """A chunk in the making: its paragraphs and sentences, each with its tokens."""

    def __init__(self, count_tokens: Callable[[str], int], size: int, overlap: int) -> None:
        self._count, self._size, self._overlap = count_tokens, size, overlap
        self._pieces: list[tuple[str, int]] = []
        self._repeated = 0
        self.headings: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self._pieces)

    def enter(self, headings: tuple[str, ...]) -> None:
        """Go on under another heading; inside a chunk it is a line of its text."""
        if self._pieces and headings:
            self.add(f"\n\n{headings[-1]}\n\n", self._count(headings[-1]))
            return
        self.headings = headings

    def add(self, text: str, tokens: int) -> None:
        self._pieces.append((text, tokens))

    def close(self, document: str, chunks: list[Chunk], least: int, keep: bool = False) -> None:
        """Put the chunk among the others; with `keep`, its last sentences begin the next one."""
        new = self._pieces[self._repeated :]
        text = "".join(text for text, _ in self._pieces)
        if new and self._count(text.strip()) >= least:
            repeated = len("".join(text for text, _ in self._pieces[: self._repeated]).lstrip())
            chunks.append(Chunk(document, len(chunks) + 1, self.headings, text.strip(), repeated))
        kept: list[tuple[str, int]] = []
        if keep:
            for piece in reversed(self._pieces[1:]):
                if sum(tokens for _, tokens in kept) + piece[1] > self._overlap:
                    break
                kept.insert(0, piece)
        self._pieces, self._repeated = kept, len(kept)


def _pieces(text: str, count_tokens: Callable[[str], int], size: int) -> Iterator[tuple[str, int]]:
    """A text's sentences with the white space behind them; a longer one than a chunk in parts."""
    for paragraph in re.split(r"(?<=\n)\n+", text):
        end = 0
        for gap in _SENTENCE_END.finditer(paragraph):
            yield from _small(paragraph[end : gap.end()], count_tokens, size)
            end = gap.end()
        yield from _small(paragraph[end:].rstrip("\n") + "\n\n", count_tokens, size)


def _small(text: str, count_tokens: Callable[[str], int], size: int) -> Iterator[tuple[str, int]]:
    """A text in parts of at most `size` tokens: at a line's end or a space where there is one, else in the middle."""
    if not text.strip():
        return
    tokens = count_tokens(text.strip())
    if tokens <= size or len(text) < 2:
        yield text, tokens
        return
    middle = len(text) // 2
    at = max(text.rfind("\n", middle // 2, middle) + 1, text.rfind(" ", middle // 2, middle) + 1) or middle
    yield from _small(text[:at], count_tokens, size)
    yield from _small(text[at:], count_tokens, size)
