"""Lines of a file of any size, in bounded memory, as UTF-8 bytes."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import BinaryIO

CHUNK = 1 << 20

#: A longer line is not held in memory. What stays of it is its beginning.
LINE_LIMIT = 64 << 20
KEPT_OF_LONG = 1 << 16

#: Byte order marks, the longer ones first: UTF-32's begins like UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class LongLine(bytes):
    """The beginning of a line beyond the limit."""


def encoding_of(head: bytes) -> tuple[str, bytes]:
    """(encoding, byte order mark) of a file that begins with `head`; UTF-16 is known by its zeros without a mark."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name, mark
    even, odd = head[0:4096:2], head[1:4096:2]
    if len(even) > 3 and odd.count(0) > 0.6 * len(odd) and even.count(0) < 0.1 * len(even):
        return "utf-16-le", b""
    if len(even) > 3 and even.count(0) > 0.6 * len(even) and odd.count(0) < 0.1 * len(odd):
        return "utf-16-be", b""
    return "utf-8", b""


class Utf8Stream:
    """A binary stream as UTF-8 without a byte order mark. Bytes that the encoding does not have stay no UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str | None = None) -> None:
        head = stream.read(CHUNK)
        found, mark = encoding_of(head)
        self.mark = bool(mark)
        self.encoding = found if mark else encoding or found  # a mark is beyond doubt
        self._stream, self._head = stream, head[len(mark) :]
        named = codecs.lookup(self.encoding).name
        if named in ("utf-16", "utf-32"):  # which expect a mark, and here is none
            self.encoding = found if found.startswith(named) else f"{named}-le"
        plain = named == "utf-8"
        # What is wrong in UTF-16 (half a pair, an odd byte at the end) becomes surrogates, which UTF-8 refuses: the
        # line they are in is then told as such, and the others are read.
        self._errors = "surrogatepass" if self.encoding.lower().startswith("utf-") else "surrogateescape"
        self._decoder = None if plain else codecs.getincrementaldecoder(self.encoding)(self._errors)

    def read(self) -> bytes:
        """The next piece; empty at the end."""
        while True:
            data, self._head = self._head or self._stream.read(CHUNK), b""
            if self._decoder is None:
                return data
            try:
                text = self._decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                self._decoder.reset()
                return b"\xff" + error.object[error.end :] if data else b"\xff"
            if text or not data:
                return text.encode("utf-8", self._errors)


def read_lines(stream: Utf8Stream, limit: int = LINE_LIMIT) -> Iterator[list[bytes]]:
    """Lines without their newline, many at a time; the last list may end with an unfinished line.

    A line beyond `limit` is a `LongLine`: its beginning alone.
    """
    pieces: list[bytes] = []  # of the unfinished line
    size = 0
    while data := stream.read():
        lines = data.split(b"\n")
        if len(lines) > 1:
            pieces.append(lines[0])
            size += len(lines[0])
            lines[0] = _joined(pieces, size, limit)
            pieces, size = [], 0
            yield [*lines[:-1]]
        if size + len(lines[-1]) <= limit or not pieces:
            pieces.append(lines[-1])
        else:  # only the beginning is kept of a line that is too long anyway
            pieces = [_joined(pieces, size, limit)[:KEPT_OF_LONG]]
        size += len(lines[-1])
    if size:
        yield [_joined(pieces, size, limit)]


def _joined(pieces: list[bytes], size: int, limit: int) -> bytes:
    if size > limit:
        return LongLine(b"".join(pieces)[:KEPT_OF_LONG])
    return b"".join(pieces) if len(pieces) != 1 else pieces[0]
