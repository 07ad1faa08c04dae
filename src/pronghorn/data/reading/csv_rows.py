"""Rows of a CSV file (RFC 4180), with the line each begins in, and without the standard reader's global field limit."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

from pronghorn.data.reading.lines import LongLine
from pronghorn.data.reading.problems import Problem
from pronghorn.pages import visible

#: Lines that one quoted field may run over; beyond, its opening quote is taken for a mistake.
LINES_OF_A_ROW = 2000
DELIMITERS = (b",", b"\t", b";", b"|")


class CsvRow(NamedTuple):
    """One row as text by column; `problem` where it has none.

    Args:
        line: that it begins in.
        data: as it stands in the file.
    """

    line: int
    data: bytes
    fields: dict[str, str] | None
    problem: Problem | None


def delimiter_of(header: bytes) -> bytes:
    """The one of the usual delimiters that the header has most of."""
    return max(DELIMITERS, key=lambda d: (re.sub(rb'"[^"]*"', b"", header).count(d), d == b","))


def read_csv(
    lines: Iterator[tuple[int, bytes]],
    delimiter: bytes | None = None,
    on_blank: Callable[[], None] = lambda: None,
) -> Iterator[CsvRow]:
    """Rows below a header line. An unreadable header is told as a row without fields, and ends the reading.

    Args:
        lines: all of the file, blank ones too: those inside of quotes belong to a text.
        on_blank: called for each blank line outside of quotes.
    """
    given = iter(lines)
    first = next(given, None)
    while first is not None and not first[1].strip():
        on_blank()
        first = next(given, None)
    if first is None:
        return
    delimiter = delimiter or delimiter_of(first[1])
    rows = _joined(chain([first], given), delimiter, on_blank)
    line, data, _ = next(rows)
    try:
        columns = [name.strip() for name in _fields(data.decode(), delimiter.decode())]
    except (UnicodeDecodeError, ValueError) as error:
        yield CsvRow(line, data, None, Problem("csv-header", f"the header cannot be read: {error}"))
        return
    # What an index or a comma at the end leaves; the name is the one that pandas gives.
    columns = [name or f"Unnamed: {index}" for index, name in enumerate(columns)]
    problem = _wrong_columns(columns)
    if problem is not None:
        yield CsvRow(line, data, None, problem)
        return
    for line, data, closed in rows:
        yield _row(line, data, closed, columns, delimiter.decode())


def _wrong_columns(columns: list[str]) -> Problem | None:
    double = {name for name in columns if columns.count(name) > 1}
    if double:
        return Problem("csv-header", f"several columns are called '{visible(min(double))}'")
    if any("\r" in name for name in columns):
        return Problem("csv-header", "lines end with a carriage return alone, so that all are the header")
    return None


def _row(line: int, data: bytes, closed: bool, columns: list[str], delimiter: str) -> CsvRow:
    if not closed:
        return CsvRow(line, data, None, Problem("csv-quote", "a quote opens in this row and never closes"))
    try:
        fields = _fields(data.decode(), delimiter)
    except UnicodeDecodeError as error:
        wrong = data[error.start : error.start + 1].hex().upper()
        return CsvRow(line, data, None, Problem("not-utf-8", f"byte {wrong} is no UTF-8"))
    except ValueError as error:
        return CsvRow(line, data, None, Problem("csv-quote", str(error)))
    if len(fields) != len(columns):
        what = f"the row has {len(fields)} fields and the header {len(columns)}"
        return CsvRow(line, data, None, Problem("csv-fields", what))
    return CsvRow(line, data, dict(zip(columns, fields, strict=True)), None)


def _joined(
    lines: Iterator[tuple[int, bytes]], delimiter: bytes, on_blank: Callable[[], None]
) -> Iterator[tuple[int, bytes, bool]]:
    """(first line, row, whether its quotes close): a row goes on while a quote is open."""
    again: deque[tuple[int, bytes]] = deque()  # lines that a quote which never closes has swallowed
    while True:
        number, data = again.popleft() if again else next(lines, (0, b""))
        if not number:
            return
        if not data.strip():
            on_blank()
            continue
        # Of a line that is too long only the beginning is there.
        opened = not isinstance(data, LongLine) and _open_after(data, delimiter, False)
        more: list[tuple[int, bytes]] = []
        while opened and len(more) < LINES_OF_A_ROW:
            following = again.popleft() if again else next(lines, None)
            if following is None:
                break
            if isinstance(following[1], LongLine):
                again.appendleft(following)
                break
            more.append(following)
            opened = _open_after(following[1], delimiter, True)
        if (
            opened
        ):  # not a row of so many lines, but a stray quote: it is told, and the lines behind it are read
            again.extendleft(reversed(more))
            more = []
        yield number, b"\n".join([data, *(text for _, text in more)]) if more else data, not opened


def _open_after(data: bytes, delimiter: bytes, opened: bool) -> bool:
    """Whether a quoted field goes on in the next line. A quote inside of a field that has begun without one is text."""
    position = 0
    while opened or data.find(b'"', position) >= 0:
        if opened:
            position = data.find(b'"', position)
            if position < 0:
                return True
            if data.startswith(b'""', position):
                position += 2
                continue
            opened = False
        elif data.startswith(b'"', position):
            opened, position = True, position + 1
            continue
        position = data.find(delimiter, position) + 1
        if not position:
            return False
    return False


def _fields(row: str, delimiter: str) -> list[str]:
    """The fields of a row.

    Raises:
        ValueError: something stands behind a closing quote.
    """
    row = row.removesuffix("\r")
    if '"' not in row:
        return row.split(delimiter)
    fields, position = [], 0
    while True:
        if row.startswith('"', position):
            end = _closing_quote(row, position + 1)
            fields.append(row[position + 1 : end].replace('""', '"'))
            position = end + 1
            if position < len(row) and not row.startswith(delimiter, position):
                raise ValueError(f"behind the closing quote stands {visible(row[position : position + 10])}")
        else:
            end = row.find(delimiter, position)
            end = len(row) if end < 0 else end
            fields.append(row[position:end])
            position = end
        if position >= len(row):
            return fields
        position += 1


def _closing_quote(row: str, position: int) -> int:
    while True:
        end = row.find('"', position)
        if end < 0:
            raise ValueError("a quote opens in this row and never closes")
        if not row.startswith('""', end):
            return end
        position = end + 2
