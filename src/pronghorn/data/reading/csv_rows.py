"""Rows of a CSV file (RFC 4180), with the line each begins in, and without the standard reader's global field limit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

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


def read_csv(lines: Iterator[tuple[int, bytes]], delimiter: bytes | None = None) -> Iterator[CsvRow]:
    """Rows below a header line. An unreadable header is told as a row without fields, and ends the reading."""
    rows = _joined(lines)
    header = next(rows, None)
    if header is None:
        return
    line, data, _ = header
    delimiter = delimiter or delimiter_of(data)
    try:
        columns = [name.strip() for name in _fields(data.decode(), delimiter.decode())]
    except (UnicodeDecodeError, ValueError) as error:
        yield CsvRow(line, data, None, Problem("csv-header", f"the header cannot be read: {error}"))
        return
    problem = _wrong_columns(columns)
    if problem is not None:
        yield CsvRow(line, data, None, problem)
        return
    for line, data, closed in rows:
        yield _row(line, data, closed, columns, delimiter.decode())


def _wrong_columns(columns: list[str]) -> Problem | None:
    double = {name for name in columns if columns.count(name) > 1}
    if "" in columns:
        return Problem("csv-header", f"column {columns.index('') + 1} has no name")
    if double:
        return Problem("csv-header", f"several columns are called '{visible(min(double))}'")
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


def _joined(lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes, bool]]:
    """(first line, row, whether its quotes close): a row goes on while a quote is open."""
    waiting: list[tuple[int, bytes]] = []
    quotes = 0
    for number, data in lines:
        if not waiting and not data.strip():
            continue
        waiting.append((number, data))
        quotes += data.count(b'"')
        if quotes % 2 and len(waiting) < LINES_OF_A_ROW:
            continue
        if quotes % 2:  # not a row of so many lines, but a stray quote: each line is told by itself
            for line, text in waiting:
                yield line, text, text.count(b'"') % 2 == 0
        else:
            yield waiting[0][0], b"\n".join(text for _, text in waiting), True
        waiting, quotes = [], 0
    for line, text in waiting:
        yield line, text, text.count(b'"') % 2 == 0


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
