"""The elements of a JSON array, or objects written one after the other, without holding the file in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from pronghorn.data.reading.lines import KEPT_OF_LONG, LINE_LIMIT, LongLine, Utf8Stream
from pronghorn.data.reading.problems import Problem

_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|//[^\n]*|#[^\n]*|/\*|["\'\[\]{},]', re.DOTALL)
_SINGLE = re.compile(rb"'[^'\\]*(?:\\.[^'\\]*)*'", re.DOTALL)
#: What lies between two brackets inside an element: whole texts, and all that is neither text nor bracket nor comment.
#: So many at a time, since each may be stepped back to. A possessive group, which forgets, ends too late in Python
#: 3.11.2.
_INSIDE = re.compile(rb'(?:[^"\'\[\]{}/#]++|"[^"\\]*+(?:\\.[^"\\]*+)*"){0,4096}', re.DOTALL)
_OPENING, _CLOSING = b"[{", b"]}"


class Element(NamedTuple):
    """Text of one element, and the line (from 1) it begins in."""

    line: int
    data: bytes


def split_elements(
    stream: Utf8Stream, tell: Callable[[int, Problem], None], limit: int = LINE_LIMIT
) -> Iterator[Element]:
    """Elements of arrays and objects at the top level of the stream, as text; brackets inside texts are none.

    An element beyond `limit` is a `LongLine`, and the last one: where it ends is not known.

    Args:
        tell: is told (line, problem) of what is wrong between elements.
    """
    return _Splitter(stream, tell, limit).elements()


class _Splitter:
    """The position in the stream: `buffer` from `start`, where the current element begins; tokens up to `scan` are
    seen. `base` is the depth at which elements stand: 1 inside an array, 0 outside."""

    def __init__(self, stream: Utf8Stream, tell: Callable[[int, Problem], None], limit: int) -> None:
        self.stream, self.tell, self.limit = stream, tell, limit
        self.buffer, self.start, self.scan = b"", 0, 0
        self.counted, self.line = 0, 1  # newlines are counted up to here
        self.depth = self.base = 0
        self.commas = 0  # since the last element
        self.ended = False

    def elements(self) -> Iterator[Element]:
        while True:
            if self.depth > self.base:
                self.scan = _INSIDE.match(self.buffer, self.scan).end()  # type: ignore[union-attr]
            token = _TOKEN.search(self.buffer, self.scan)
            if (token is None or self._may_go_on(token)) and not self.ended:
                if len(self.buffer) - self.start > self.limit:
                    yield Element(
                        self._line_at(self.start), LongLine(self.buffer[self.start :][:KEPT_OF_LONG])
                    )
                    return
                self._read_more()
                continue
            if token is None:
                break
            if self.depth > self.base + 1 and token[0] in (b"{", b"}", b"[", b"]"):
                self.depth += 1 if token[0] in _OPENING else -1
                self.scan = token.end()
            else:
                yield from self._at(token)
        yield from self._emit(len(self.buffer))
        if self.base:
            self.tell(self._line_at(len(self.buffer)), Problem("truncated", "the array is never closed"))

    def _may_go_on(self, token: re.Match[bytes]) -> bool:
        """A text, or a comment, whose end has not been read yet."""
        start = token[0][:1]
        if start == b"'":
            return self._begins_text(token.start()) and _SINGLE.match(self.buffer, token.start()) is None
        if token[0] == b"/*":
            return self.buffer.find(b"*/", token.end()) < 0
        return token[0] == b'"' or (start in b"/#" and token.end() == len(self.buffer))

    def _read_more(self) -> None:
        data = self.stream.read()
        # As much again as there is, or a long text would be searched from its beginning once a piece.
        pieces, wanted = [data], len(self.buffer) - self.start
        while data and sum(map(len, pieces)) < wanted:
            data = self.stream.read()
            pieces.append(data)
        self.ended = not data
        self._line_at(self.start)
        self.buffer = self.buffer[self.start :] + b"".join(pieces)
        self.scan -= self.start
        self.counted -= self.start
        self.start = 0

    def _at(self, token: re.Match[bytes]) -> Iterator[Element]:
        char, self.scan = token[0], token.end()
        if char == b"'" and self._begins_text(token.start()):
            text = _SINGLE.match(self.buffer, token.start())
            self.scan = text.end() if text else self.scan
        elif char == b"/*":
            end = self.buffer.find(b"*/", token.end())
            self.scan = end + 2 if end >= 0 else len(self.buffer)
        elif len(char) > 1 or char in b"\"'#":
            return
        elif char == b"," and self.depth == self.base:
            yield from self._emit(token.start())
            self.start = self.scan
            self.commas += 1
            if self.commas > 1:
                self.tell(self._line_at(token.start()), Problem("trailing-comma", "a comma too many"))
        elif char in _OPENING:
            if self.depth == 0 and char == b"[":
                yield from self._emit(token.start())
                self.start, self.base = self.scan, 1
            self.depth += 1
        elif char in _CLOSING:
            yield from self._close(token)

    def _close(self, token: re.Match[bytes]) -> Iterator[Element]:
        if self.depth > self.base:
            self.depth -= 1
            if self.depth == self.base:
                yield from self._emit(token.end())
                self.start = token.end()
        elif self.base and token[0] == b"]":
            yield from self._emit(token.start())
            if self.commas:
                self.tell(
                    self._line_at(token.start()), Problem("trailing-comma", "a comma after the last row")
                )
            self.start, self.depth, self.base, self.commas = token.end(), 0, 0, 0

    def _emit(self, end: int) -> Iterator[Element]:
        data = self.buffer[self.start : end]
        text = data.strip()
        if text:
            self.commas = 0
            yield Element(self._line_at(self.start + len(data) - len(data.lstrip())), text)
        self.start = end

    def _line_at(self, position: int) -> int:
        """The line of a position, which never lies before the one asked for last."""
        if position > self.counted:
            self.line += self.buffer.count(b"\n", self.counted, position)
            self.counted = position
        return self.line

    def _begins_text(self, position: int) -> bool:
        """Whether a quote here opens a text: it follows a bracket, a comma or a colon."""
        while position and self.buffer[position - 1 : position].isspace():
            position -= 1
        return position > 0 and self.buffer[position - 1 : position] in b"[{,:"
