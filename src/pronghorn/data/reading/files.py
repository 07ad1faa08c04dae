"""A file of rows of any usual kind, read row by row: every row with its line, and with what is wrong with it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pronghorn.data.reading.csv_rows import read_csv
from pronghorn.data.reading.elements import split_elements
from pronghorn.data.reading.lines import LongLine, Utf8Stream, read_lines
from pronghorn.data.reading.parse import Parsed, parse, sound_row
from pronghorn.data.reading.problems import Problem
from pronghorn.errors import CommandMisused, RowsUnreadable

Container = Literal["JSON Lines", "JSON array", "JSON objects", "CSV", "Parquet", "plain text"]
SUFFIXES: dict[str, str] = {
    ".jsonl": "JSON", ".ndjson": "JSON", ".json": "JSON", ".csv": "CSV", ".tsv": "CSV", ".parquet": "Parquet",
    ".txt": "plain text", ".text": "plain text",
}  # fmt: skip

#: How compressed files begin, and what unpacks them.
_PACKED = {
    b"\x1f\x8b": "gzip -d",
    b"\x28\xb5\x2f\xfd": "zstd -d",
    b"BZh": "bzip2 -d",
    b"\xfd7zX": "xz -d",
    b"PK\x03\x04": "unzip",
}

#: Lines that a row with a raw newline in a text may run over, and their size.
_LINES_OF_A_ROW = 64
_BYTES_OF_A_ROW = 4 << 20
_PARQUET_BATCH = 256


@dataclass(slots=True)
class Record:
    """One row as it was read.

    Args:
        line: it begins in, from 1; 0 in Parquet.
        row: its number from 1.
        value: what stands there; None with a problem.
        text: its JSON (UTF-8), None where the file holds none (CSV, Parquet, plain text).
        original: as it stands in the file; for Parquet empty, or the text that is no UTF-8.
    """

    line: int
    row: int
    value: Any
    text: bytes | None
    repairs: tuple[str, ...]
    problem: Problem | None
    original: bytes

    def place(self, name: str) -> str:
        """Where it stands in a file of that name, in words."""
        return f"{name}, line {self.line}" if self.line else f"{name}, row {self.row}"


class RowFile:
    """A file of rows. Iterate over `records()` once; `told` then holds what is wrong with the file as a whole.

    Args:
        encoding: of a text file, where it is not UTF-8 and has no byte order mark.

    Raises:
        CommandMisused: there is no such file, or it is of no kind that is read.
        RowsUnreadable: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], encoding: str | None = None) -> None:
        self.path = Path(path).expanduser()
        self.name = str(path)
        self.told: list[tuple[int, Problem]] = []
        self.blank = self.windows_lines = 0
        self.encoding = "utf-8"
        self._wanted_encoding = _known_encoding(encoding)
        self._stream: BinaryIO | None = None
        self.size = self._checked_size()
        self.container = self._detect()
        #: Whether a row is told by its number rather than by its line alone.
        self.numbered = self.container not in ("JSON Lines", "plain text")

    @property
    def position(self) -> int:
        """Bytes read so far."""
        stream = self._stream
        return self.size if stream is None or stream.closed else stream.tell()

    def records(self) -> Iterator[Record]:
        """The rows from the first to the last; what cannot be read of them is a record with a problem."""
        if self.container == "Parquet":
            yield from self._parquet()
            return
        with self._open() as stream:
            self._stream = stream
            text = Utf8Stream(stream, self._wanted_encoding)
            self._tell_encoding(text)
            try:
                yield from self._of_text(text)
            except OSError as error:
                self.told.append((0, Problem("unreadable", f"reading ended: {error.strerror or error}")))
        if self.windows_lines:
            self.told.append((1, Problem("crlf", f"{self.windows_lines} lines end with a carriage return")))

    def _of_text(self, text: Utf8Stream) -> Iterator[Record]:
        if self.container == "JSON Lines":
            yield from self._json_lines(text)
        elif self.container == "CSV":
            yield from self._csv(text)
        elif self.container == "plain text":
            yield from self._plain(text)
        else:
            yield from self._elements(text)

    def _checked_size(self) -> int:
        try:
            facts = self.path.stat()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise CommandMisused(f"there is no file '{self.name}': {reason}", fix="check the name") from None
        if not stat.S_ISREG(facts.st_mode):
            if stat.S_ISDIR(facts.st_mode):
                raise CommandMisused(f"'{self.name}' is a folder", fix=f"name files: {self.path / '*.jsonl'}")
            raise CommandMisused(f"'{self.name}' is no regular file", fix="name files of rows")
        return facts.st_size

    def _open(self) -> BinaryIO:
        try:
            return self.path.open("rb", buffering=0)
        except OSError as error:
            raise RowsUnreadable(
                f"'{self.name}' cannot be opened: {error.strerror}", fix="check the file's permissions"
            ) from None

    # --- which kind of file ---------------------------------------------------------------------------------------

    def _detect(self) -> Container:
        suffix = self.path.suffix.lower()
        with self._open() as stream:
            text = Utf8Stream(stream, self._wanted_encoding)
            raw = text._head[:4]
            try:
                head = b"" if raw == b"PAR1" else text.read()
            except OSError as error:
                raise RowsUnreadable(
                    f"'{self.name}' cannot be read: {error.strerror}", fix="check it"
                ) from None
        packed = next((how for mark, how in _PACKED.items() if raw.startswith(mark)), None)
        if packed is not None:
            raise CommandMisused(f"'{self.name}' is compressed", fix=f"unpack it first: {packed} {self.path}")
        if raw == b"PAR1" or suffix == ".parquet":
            return "Parquet"
        kind = SUFFIXES.get(suffix) or ("JSON" if head.lstrip()[:1] in (b"{", b"[") else None)
        if kind is None:
            raise CommandMisused(
                f"'{self.name}' is not a kind of file that is read", fix=f"name one of {', '.join(SUFFIXES)}"
            )
        if kind == "CSV":
            return "CSV"
        return "plain text" if kind == "plain text" else self._json_container(head, suffix)

    def _json_container(self, head: bytes, suffix: str) -> Container:
        lines = [line for line in head.split(b"\n", 64) if line.strip()]
        first, second = [*lines[:2], b"", b""][:2]
        start = first.strip()
        if start[:1] == b"[" and (suffix not in (".jsonl", ".ndjson") or _begins_array(first, second)):
            return "JSON array"
        indented = second[:1].isspace() or suffix not in (".jsonl", ".ndjson")
        if start[:1] == b"{" and second.strip() and indented and not second.lstrip().startswith(b"{"):
            # An object that goes on in the next line is written over several: all of it is read by its brackets.
            problem = parse(first).problem
            if problem is not None and problem.kind == "truncated" and start[-1:] in b"{[,:":
                return "JSON objects"
        return "JSON Lines"

    def _tell_encoding(self, text: Utf8Stream) -> None:
        self.encoding = text.encoding
        if text.encoding.startswith(("utf-16", "utf-32")):
            self.told.append((1, Problem("utf-16", f"the file is {text.encoding.upper()}, not UTF-8")))
        elif text.mark:
            self.told.append((1, Problem("bom", "the file begins with a byte order mark")))
        if self.container == "JSON array" and self.path.suffix.lower() in (".jsonl", ".ndjson"):
            self.told.append((1, Problem("array-in-jsonl", "the file is one JSON array, not a row a line")))

    # --- kinds of files -------------------------------------------------------------------------------------------

    def _numbered_lines(self, text: Utf8Stream) -> Iterator[tuple[int, bytes]]:
        """Lines from 1 that are not blank, without carriage returns at their ends."""
        number = 0
        for lines in read_lines(text):
            for line in lines:
                number += 1
                if line.endswith(b"\r"):
                    self.windows_lines += 1
                    line = line[:-1] if not isinstance(line, LongLine) else line
                if not line or line.isspace():
                    self.blank += 1
                else:
                    yield number, line

    def _json_lines(self, text: Utf8Stream) -> Iterator[Record]:
        row = 0
        waiting: list[tuple[int, bytes]] = []  # lines of a row that may go on
        for number, line in self._numbered_lines(text):
            if isinstance(line, LongLine):
                row += 1
                yield Record(number, row, None, None, (), _TOO_LONG, line)
                continue
            value = sound_row(line) if not waiting else None
            if value is not None:
                row += 1
                yield Record(number, row, value, line, (), None, line)
                continue
            parsed = parse(line)
            if waiting:
                joined = _join(waiting, line, parsed)
                if joined is None:
                    for record in _apart(waiting, row):
                        row = record.row
                        yield record
                    waiting = []
                elif joined.problem is not None:
                    waiting.append((number, line))
                    continue
                else:
                    original = b"\n".join(text for _, text in [*waiting, (number, line)])
                    joined.repairs = (*joined.repairs, "split-row")
                    number, line, parsed, waiting = waiting[0][0], original, joined, []
            problem = parsed.problem
            if problem is not None and problem.kind == "truncated" and line.lstrip().startswith(b"{"):
                waiting.append((number, line))
                continue
            for record in _records(number, row, line, parsed):
                row = record.row
                yield record
        yield from _apart(waiting, row)

    def _elements(self, text: Utf8Stream) -> Iterator[Record]:
        row = 0
        for line, data in split_elements(text, lambda line, problem: self.told.append((line, problem))):
            if isinstance(data, LongLine):
                self.told.append((line, _TOO_LONG_REST))
                return
            for record in _records(line, row, data, parse(data)):
                row = record.row
                yield record

    def _csv(self, text: Utf8Stream) -> Iterator[Record]:
        delimiter = b"\t" if self.path.suffix.lower() == ".tsv" else None
        all_lines = enumerate((line for lines in read_lines(text) for line in lines), start=1)
        for row, found in enumerate(read_csv(all_lines, delimiter, self._count_blank), start=1):
            problem = _TOO_LONG if isinstance(found.data, LongLine) else found.problem
            fields = None if problem else found.fields
            yield Record(found.line, row, fields, None, (), problem, found.data)

    def _count_blank(self) -> None:
        self.blank += 1

    def _plain(self, text: Utf8Stream) -> Iterator[Record]:
        for row, (number, line) in enumerate(self._numbered_lines(text), start=1):
            if isinstance(line, LongLine):
                yield Record(number, row, None, None, (), _TOO_LONG, line)
                continue
            try:
                yield Record(number, row, {"text": line.decode()}, None, (), None, line)
            except UnicodeDecodeError:
                yield Record(number, row, None, None, (), parse(line).problem, line)

    def _parquet(self) -> Iterator[Record]:
        import pyarrow as pa  # type: ignore[import-untyped]
        from pyarrow import parquet

        row = 0
        try:
            with self._open() as stream, parquet.ParquetFile(stream) as file:
                for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                    for record in _of_batch(batch, row):
                        row = record.row
                        yield record
        except (pa.ArrowException, OSError, ValueError) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            after = f" after row {row}" if row else ""
            self.told.append((0, Problem("unreadable", f"this Parquet file cannot be read{after}: {said}")))


def _of_batch(batch: Any, before: int) -> Iterator[Record]:
    """The rows of a batch of a Parquet file; a text may hold any bytes, whatever the format says of it."""
    try:
        values: list[Any] | None = batch.to_pylist()
    except UnicodeDecodeError:
        values = None
    for index in range(batch.num_rows):
        row = before + index + 1
        try:
            value = batch.slice(index, 1).to_pylist()[0] if values is None else values[index]
        except UnicodeDecodeError as error:
            problem = Problem("parquet-text", f"byte {error.object[error.start]:02X} of a text is no UTF-8")
            yield Record(0, row, None, None, (), problem, error.object)
        else:
            yield Record(0, row, value, None, (), None, b"")


_TOO_LONG = Problem("long-line", "the line is longer than 64 MiB; only its beginning is kept")
_TOO_LONG_REST = Problem("long-line", "a row is longer than 64 MiB or never ends; nothing behind it is read")


def _begins_array(first: bytes, second: bytes) -> bool:
    """Whether the lines of a .jsonl file begin an array of rows, rather than being lists each."""
    inside, following = first.strip()[1:].lstrip(), second.strip()[:1]
    a_list_each = following == b"[" and not parse(first).problem
    a_stray_bracket = following == b"{" and first.rstrip()[-1:] == b"}"
    return not a_list_each and not a_stray_bracket and inside[:1] in (b"", b"{", b"]", b"/", b"#", b"'")


def _records(line: int, row: int, data: bytes, parsed: Parsed) -> Iterator[Record]:
    """The rows of one piece of text; a comment alone is none, but is told as a repair."""
    if parsed.problem is not None:
        yield Record(line, row + 1, None, None, (), parsed.problem, data)
    elif parsed.texts is None:
        yield Record(line, row + 1, parsed.values[0], data, (), None, data)
    elif not parsed.texts:
        yield Record(line, row, None, b"", parsed.repairs, None, data)
    else:
        for index, (value, text) in enumerate(zip(parsed.values, parsed.texts, strict=True), start=1):
            repairs = parsed.repairs if index == 1 else ()
            yield Record(line, row + index, value, text.encode("utf-8"), repairs, None, data)


def _join(waiting: list[tuple[int, bytes]], line: bytes, parsed: Parsed) -> Parsed | None:
    """`line` as the end of a row that began in the lines before; None when it is not.

    It is not where it is a row itself or begins like one: then the row before was truncated.
    """
    begins_a_row = line.lstrip().startswith(b"{") or (parsed.problem is None and parsed.values)
    size = len(line) + sum(len(text) for _, text in waiting)
    if begins_a_row or len(waiting) >= _LINES_OF_A_ROW or size > _BYTES_OF_A_ROW:
        return None
    joined = parse(b"\n".join([*(text for _, text in waiting), line]))
    return joined if joined.problem is None or joined.problem.kind == "truncated" else None


def _apart(waiting: list[tuple[int, bytes]], row: int) -> Iterator[Record]:
    """Lines that make no row together, each by itself."""
    for index, (number, line) in enumerate(waiting, start=1):
        yield from _records(number, row + index - 1, line, parse(line))


def _known_encoding(name: str | None) -> str | None:
    """The name, if Python has a text encoding of it.

    Raises:
        CommandMisused: it has none.
    """
    try:
        "".encode(name or "utf-8")
    except LookupError:
        raise CommandMisused(
            f"there is no text encoding '{name}'", fix="name one such as cp1252, latin-1, utf-16 or shift_jis"
        ) from None
    return name
