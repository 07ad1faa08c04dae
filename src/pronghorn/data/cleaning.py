"""A file of rows to a file that trains: what has one safe repair is repaired, what has none is set aside.

Rows that are right are copied byte for byte; nothing disappears without being counted: rows in = rows out + rejected +
duplicates. Cleaning what was cleaned changes nothing.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import math
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from pronghorn.data.checks.duplicates import SeenRows, digest
from pronghorn.data.checks.formats import (
    Format,
    canonical,
    format_of,
    list_in_text,
    problems_of,
    trained_content,
)
from pronghorn.data.reading import Problem, Record, RowFile, level_of
from pronghorn.data.reading.json_repair import Irreparable, repair_json
from pronghorn.data.reading.lines import LongLine
from pronghorn.errors import CommandMisused, RowsUnreadable

#: Rows whose formats are counted for that of the file.
FIRST_ROWS = 200
_ROWS_BETWEEN_REPORTS = 1000


@dataclass
class CleanResult:
    """What cleaning did. `repairs` and `rejected` count by kind of problem; `duplicates` is 0 unless asked for."""

    source: str
    target: str
    rejected_file: str | None = None
    rows_in: int = 0
    rows_out: int = 0
    duplicates: int = 0
    blank_lines: int = 0
    format: str | None = None
    repairs: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)

    @property
    def rows_rejected(self) -> int:
        return sum(self.rejected.values())

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "repairs": dict(self.repairs), "rejected": dict(self.rejected)}


def clean(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dedup: bool = False,
    force: bool = False,
    encoding: str | None = None,
    text_field: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> CleanResult:
    """Write the rows of `source` that can be trained on to `target` as JSON Lines, the others beside it.

    Rejected rows go to ``TARGET.rejected.jsonl`` with line, reason and their text. Both files are written under
    temporary names and moved when all is written. Memory is bounded, whatever the size of the file.

    Args:
        dedup: leave out rows that teach the same as an earlier one.
        force: replace files that exist.
        encoding: of `source`, where it is not UTF-8.
        progress: is told (bytes read, bytes in all) now and then.

    Raises:
        CommandMisused: source and target are the same, target exists, is no .jsonl, or cannot be written.
        RowsUnreadable: source cannot be read to its end; nothing is written then.
    """
    file = RowFile(source, encoding)
    path = _target_path(Path(target).expanduser())
    aside = path.with_name(path.name.removesuffix(path.suffix) + ".rejected.jsonl")
    for taken in (path, aside):
        _check_target(taken, file.path, force)
    result = CleanResult(str(source), str(target))
    with _replacing(path) as out, _replacing(aside, keep_empty=False) as rejects:
        _Cleaner(file, out, rejects, result, dedup, text_field).run(progress)
    if result.rejected:
        beside = Path(target).with_name(aside.name)
        result.rejected_file = str(beside if beside.resolve() == aside else aside)
    return result


def _target_path(path: Path) -> Path:
    """Where the file really lies: a link stays a link.

    Raises:
        CommandMisused: it is no .jsonl, or its folder is not there.
    """
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise CommandMisused(
            f"cleaned rows are JSON Lines, and '{path}' is named otherwise", fix=f"name it {path.stem}.jsonl"
        )
    try:
        path = path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise CommandMisused(f"'{path}' cannot be written: {error}", fix="name another file") from None
    if not path.parent.is_dir():
        raise CommandMisused(f"there is no folder '{path.parent}'", fix="make it, or name another")
    return path


def _check_target(path: Path, source: Path, force: bool) -> None:
    if not path.exists():
        return
    if path.samefile(source):
        raise CommandMisused(
            f"'{path}' is the file that is read", fix="name another file; the original is never changed"
        )
    if not path.is_file():
        raise CommandMisused(f"'{path}' is no regular file", fix="name another file")
    if not force:
        raise CommandMisused(f"'{path}' exists", fix="name another file, or replace it with --force")


@contextmanager
def _replacing(path: Path, *, keep_empty: bool = True) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when all is written; after an error nothing has changed.

    Args:
        keep_empty: False: without content there is no file in the end.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        stream = temporary.open("xb", buffering=1 << 20)
    except OSError as error:
        raise CommandMisused(
            f"'{path.parent}' cannot be written: {error.strerror}", fix="name a file in another folder"
        ) from None
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            empty = not stream.tell()
        if empty and not keep_empty:
            path.unlink(missing_ok=True)
            temporary.unlink()
        else:
            os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CommandMisused(
            f"'{path}' cannot be written: {error.strerror}", fix="free space, or name another place"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class _Cleaner:
    """One run over one file."""

    def __init__(
        self,
        file: RowFile,
        out: BinaryIO,
        rejects: BinaryIO,
        result: CleanResult,
        dedup: bool,
        text_field: str,
    ) -> None:
        self.file, self.out, self.rejects, self.result = file, out, rejects, result
        self.text_field = text_field
        self.seen = SeenRows() if dedup else None
        self.usual: Format | None = None

    def run(self, progress: Callable[[int, int], None] | None) -> None:
        records = self.file.records()
        first = list(islice(records, FIRST_ROWS))
        self.usual = self._usual_format(first)
        self.result.format = self.usual
        for record in first:
            self._take(record)
        del first
        for number, record in enumerate(records):
            self._take(record)
            if progress is not None and number % _ROWS_BETWEEN_REPORTS == 0:
                progress(self.file.position, self.file.size)
        self._finish()
        if progress is not None:
            progress(self.file.size, self.file.size)

    def _usual_format(self, records: list[Record]) -> Format | None:
        found = Counter(
            format_of(record.value, self.text_field) for record in records if isinstance(record.value, dict)
        )
        known = [(format, count) for format, count in found.most_common() if format is not None]
        return known[0][0] if known else None

    def _take(self, record: Record) -> None:
        result = self.result
        if record.repairs:
            result.repairs.update(record.repairs)
        if record.problem is None and record.value is None and record.text == b"":
            return  # a comment
        result.rows_in += 1
        if record.problem is not None:
            self._reject(record, record.problem)
            return
        value, text = record.value, record.text
        own = format_of(value, self.text_field) if type(value) is dict else None
        format = own or self.usual
        for problem in problems_of(value, format, self.text_field):
            if problem.kind == "json-in-text":
                value = {**value, problem.field: list_in_text(value[problem.field])}
                text = None
                format = format_of(value, self.text_field)
                again = [p for p in problems_of(value, format, self.text_field) if level_of(p) == "error"]
                if again:
                    self._reject(record, again[0])
                    return
                result.repairs["json-in-text"] += 1
            elif level_of(problem) == "error":
                self._reject(record, problem)
                return
        if self.seen is not None:
            key = digest(canonical(trained_content(value, format, self.text_field)))
            if self.seen.first(key, 0) is not None:
                result.duplicates += 1
                return
        if text is None or b"\n" in text or b"\r" in text:
            text = self._one_line(record, value, text)
            if text is None:
                return
        self.out.write(text)
        self.out.write(b"\n")
        result.rows_out += 1

    def _one_line(self, record: Record, value: Any, text: bytes | None) -> bytes | None:
        """The row as one line of JSON; None where it holds what JSON does not have, and is rejected for it."""
        try:
            if text is not None:
                return repair_json(text.decode()).texts[0].encode()
            return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_as_text).encode()
        except Irreparable as reason:
            self._reject(record, Problem(reason.kind, reason.what))
            return None
        except TypeError as error:
            self._reject(record, Problem("wrong-type", f"a value that JSON does not have: {error}"))
            return None
        except ValueError:
            pass
        without, missing, endless = _without_nan(value)
        if endless:
            self._reject(record, Problem("infinity", "Infinity is a number that JSON does not have"))
            return None
        self.result.repairs["nan"] += bool(missing)
        try:
            return json.dumps(without, ensure_ascii=False, allow_nan=False, default=_as_text).encode()
        except (ValueError, TypeError) as error:
            self._reject(record, Problem("wrong-type", f"a value that JSON does not have: {error}"))
            return None

    def _reject(self, record: Record, problem: Problem) -> None:
        self.result.rejected[problem.kind] += 1
        entry: dict[str, Any] = {"file": self.file.name}
        if record.line:
            entry["line"] = record.line
        if self.file.numbered:
            entry["row"] = record.row
        entry |= {"kind": problem.kind, "reason": problem.what}
        if problem.field:
            entry["field"] = problem.field
        try:
            entry["original"] = (
                record.original.decode() if record.original else json.dumps(record.value, default=str)
            )
        except UnicodeDecodeError:
            entry["original_base64"] = base64.b64encode(record.original).decode()
        if isinstance(record.original, LongLine):
            entry["original_is_cut"] = True
        self.rejects.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

    def _finish(self) -> None:
        """What is wrong with the file as a whole is repaired by now, or it could not be read to its end.

        Raises:
            RowsUnreadable: rows behind the place were not read; without them the result would look complete.
        """
        self.result.blank_lines = self.file.blank
        for line, problem in self.file.told:
            if problem.kind in ("unreadable", "long-line"):
                where = f"{self.file.name}, line {line}" if line else self.file.name
                raise RowsUnreadable(
                    problem.what, where=where, fix="write the file again; nothing was changed"
                )
            if problem.kind == "crlf":
                self.result.repairs["crlf"] += self.file.windows_lines
            elif problem.kind != "truncated":  # its broken row was rejected
                self.result.repairs[problem.kind] += 1


def _as_text(value: Any) -> str:
    """Dates, times and exact decimals of a Parquet file as they are usually written."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError(type(value).__name__)


def _without_nan(value: Any) -> tuple[Any, bool, bool]:
    """(the value with null for NaN, whether there was any, whether there was an Infinity)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, math.isnan(value), math.isinf(value)
    if isinstance(value, dict):
        parts = {key: _without_nan(item) for key, item in value.items()}
        return (
            {key: part[0] for key, part in parts.items()},
            any(part[1] for part in parts.values()),
            any(part[2] for part in parts.values()),
        )
    if isinstance(value, list):
        items = [_without_nan(item) for item in value]
        return [i[0] for i in items], any(i[1] for i in items), any(i[2] for i in items)
    return value, False, False
