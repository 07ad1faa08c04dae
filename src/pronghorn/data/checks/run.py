"""`check`: every problem of files of rows, in one pass over them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from pronghorn.data.checks.characters import CharacterCheck
from pronghorn.data.checks.duplicates import SeenRows, digest
from pronghorn.data.checks.formats import (
    NAMES,
    Format,
    canonical,
    format_of,
    problems_of,
    question_of,
    texts_of,
    trained_content,
)
from pronghorn.data.checks.measure import Measured, Meter, measure
from pronghorn.data.checks.report import FileFacts, Report
from pronghorn.data.reading import KINDS, Problem, Record, RowFile, level_of
from pronghorn.data.rows import CHAT_COLUMNS
from pronghorn.pages import visible

#: Rows whose formats are counted for that of the file.
FIRST_ROWS = 200
SAMPLES = 5
_ROWS_BETWEEN_REPORTS = 256
_SAMPLE_CHARS = 200
#: Columns whose types are compared; no table has more.
_COLUMNS = 1000
#: A place in one number: the file, and the line (or row) in it.
_FILE_SHIFT = 48

Progress = Callable[[int, int], None]
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def check(
    files: Paths,
    *,
    tokenizer: Any = None,
    max_seq_length: int | None = None,
    responses_only: bool = True,
    near_duplicates: bool = True,
    limit: int | None = 1000,
    encoding: str | None = None,
    text_field: str = "text",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Read files of rows and tell everything that is wrong with them; several files are splits of one data set.

    Args:
        tokenizer: a tokenizer, or the name of one: tokens and the chat template are checked, too.
        max_seq_length: tokens that training keeps of a row.
        responses_only: training is on answers only.
        near_duplicates: look for rows that are nearly the same (256 bytes of memory a row, up to a million rows).
        limit: problems listed of each kind; None lists all. They are counted in any case.
        encoding: of text files that are not UTF-8.
        workers: processes that tokenize; None takes one for each core, at most 8.
        progress: is told (bytes read, bytes in all) now and then.

    Raises:
        CommandMisused: a file is not there, or of no kind that is read.
        RowsUnreadable: a file cannot be opened.
    """
    paths: Sequence[Any] = [files] if isinstance(files, str | os.PathLike) else list(files)
    opened = [RowFile(path, encoding) for path in paths]
    meter = None
    if tokenizer is not None:
        meter = Meter(
            load_named(tokenizer),
            max_seq_length,
            responses_only=responses_only,
            text_field=text_field,
            thorough=True,
        )
    run = _Check(opened, limit, text_field, near_duplicates, meter, workers, progress)
    return run.report()


def load_named(tokenizer: Any) -> Any:
    """A tokenizer by its name; a tokenizer itself stays."""
    if not isinstance(tokenizer, str | os.PathLike):
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(os.fspath(tokenizer))


class _At(NamedTuple):
    """Where a row stands: its line (0 in Parquet), and its number where rows are not lines (0 otherwise)."""

    line: int
    row: int

    @property
    def number(self) -> int:
        return self.line or self.row


class _Check:
    """One check over all files."""

    def __init__(
        self,
        files: list[RowFile],
        limit: int | None,
        text_field: str,
        near: bool,
        meter: Meter | None,
        workers: int | None,
        progress: Progress | None,
    ) -> None:
        self.files, self.text_field, self.meter, self.workers = files, text_field, meter, workers
        self.progress = progress
        self.result = Report(limit=limit, max_seq_length=meter.max_length if meter else None)
        self.rows, self.questions, self.characters = SeenRows(), SeenRows(), CharacterCheck()
        self.near = None
        if near:
            from pronghorn.data.checks.near import Signatures

            self.near = Signatures()
        self.total = sum(file.size for file in files)
        self.told_of_template: set[str] = set()

    def report(self) -> Report:
        for index, file in enumerate(self.files):
            one = _FileCheck(self, index, file)
            if self.meter is None:
                for _ in one.sound_rows():
                    pass
            else:
                for place, measured in measure(one.sound_rows(), self.meter, self.workers):
                    one.take_measured(place, measured)
            one.finish()
        self._tell_near()
        order = {file.name: index for index, file in enumerate(self.files)}
        self.result.findings.sort(key=lambda f: (order.get(f.file, 0), f.line or f.row))
        return self.result

    def place(self, number: int) -> tuple[int, int]:
        """(index of the file, line or row) of a place."""
        return number >> _FILE_SHIFT, number & ((1 << _FILE_SHIFT) - 1)

    def named(self, number: int, here: int) -> str:
        """A place as it is told in the file `here`."""
        index, at = self.place(number)
        file = self.files[index]
        at_line = f"{'row' if file.container == 'Parquet' else 'line'} {at}"
        return at_line if index == here else f"{file.name}, {at_line}"

    def tell(self, problem: Problem, index: int, at: _At, sample: str = "") -> None:
        self.result.add(problem, self.files[index].name, at.line, at.row, sample)

    def _tell_near(self) -> None:
        if self.near is None:
            return
        for number, earlier, similarity in self.near.pairs():
            index, at = self.place(number)
            kind = "near-duplicate" if self.place(earlier)[0] == index else "near-leakage"
            what = f"about {similarity:.0%} the same as {self.named(earlier, index)}"
            where = _At(0, at) if self.files[index].container == "Parquet" else _At(at, 0)
            self.tell(Problem(kind, what), index, where)
        if self.near.left_out:
            self.result.notes.append(
                f"{self.near.left_out:,} rows behind the first {self.near.limit:,} were not compared for being nearly "
                "the same"
            )


@dataclass
class _Seen:
    """A type of a column: its first row, and how many rows have it."""

    first: _At
    rows: int = 0


class _FileCheck:
    """One file of a check."""

    def __init__(self, whole: _Check, index: int, file: RowFile) -> None:
        self.whole, self.index, self.file = whole, index, file
        self.facts = FileFacts(file.name, file.size, file.container)
        self.types: dict[str, dict[str, _Seen]] = {}  # by column, by type
        self.usual: Format | None = None
        whole.result.files.append(self.facts)

    def sound_rows(self) -> Iterator[tuple[_At, Mapping[str, Any], Format | None]]:
        """(place, row, format) of every row without errors; all problems of all rows are told on the way."""
        records = self.file.records()
        first = list(islice(records, FIRST_ROWS))
        self.usual = self._usual_format(first)
        self.facts.format = self.usual
        before = sum(file.size for file in self.whole.files[: self.index])
        for record in first:
            yield from self._checked(record)
        del first
        for number, record in enumerate(records):
            yield from self._checked(record)
            if self.whole.progress is not None and number % _ROWS_BETWEEN_REPORTS == 0:
                self.whole.progress(before + self.file.position, self.whole.total)

    def take_measured(self, at: _At, measured: Measured) -> None:
        for problem in measured.problems:
            if problem.kind in ("no-template", "template-opaque"):  # of the tokenizer, not of the row
                if problem.kind in self.whole.told_of_template:
                    continue
                self.whole.told_of_template.add(problem.kind)
            self._tell(problem, at)
        if any(level_of(problem) == "error" for problem in measured.problems):
            self.facts.bad_rows += 1
        if measured.tokens:
            self.facts.tokens.append(measured.tokens)
            self.facts.supervised.append(measured.supervised)
            self.facts.kept.append(measured.kept)

    def finish(self) -> None:
        """What is known at the end only: the file as a whole, and its columns."""
        self.facts.encoding = self.file.encoding
        for line, problem in self.file.told:
            self._tell(problem, _At(line, 0))
        if not self.facts.rows and not self.facts.bad_rows and not self.file.told:
            self._tell(Problem("empty-file", "the file holds no rows"), _At(0, 0))
        for column, types in self.types.items():
            if len(types) > 1:
                self._tell_types(column, types)

    def _usual_format(self, records: list[Record]) -> Format | None:
        formats = (format_of(r.value, self.whole.text_field) for r in records if isinstance(r.value, Mapping))
        counts = Counter(format for format in formats if format is not None)
        return counts.most_common(1)[0][0] if counts else None

    def _checked(self, record: Record) -> Iterator[tuple[_At, Mapping[str, Any], Format | None]]:
        at = _At(record.line, record.row if self.file.numbered else 0)
        for kind in record.repairs:
            self._tell(Problem(kind, KINDS[kind].title), at, record)
        if record.problem is None and record.value is None and record.text == b"":
            return  # a comment
        if record.problem is not None:
            self._tell(record.problem, at, record)
            self.facts.bad_rows += 1
            self.facts.unread += 1
            return
        row, field = record.value, self.whole.text_field
        own = format_of(row, field) if isinstance(row, Mapping) else None
        format = own or self.usual
        problems = problems_of(row, format, field)
        if own is not None and own != self.usual and self.usual is not None:
            what = f"this row is {NAMES[own]}, the others are {NAMES[self.usual]}"
            problems.append(Problem("mixed-format", what))
        texts = list(texts_of(row))
        problems += self.whole.characters.problems(texts)
        for problem in problems:
            self._tell(problem, at, record)
        self.facts.rows += 1
        self.facts.characters.append(sum(len(text) for _, text in texts))
        if len(self.facts.samples) < SAMPLES:
            self.facts.samples.append((at.number, _sample(row, texts)))
        broken = any(level_of(problem) == "error" for problem in problems)
        self.facts.bad_rows += broken or bool(record.repairs)
        if broken:
            return
        self._note_types(row, at)
        self._compare(row, format, at)
        yield at, row, format

    def _compare(self, row: Mapping[str, Any], format: Format | None, at: _At) -> None:
        """With the rows before, of all files."""
        whole, here = self.whole, self.index
        place = here << _FILE_SHIFT | at.number
        content = trained_content(row, format, whole.text_field)
        earlier = whole.rows.first(digest(canonical(content)), place)
        if earlier is not None:
            kind = "duplicate" if whole.place(earlier)[0] == here else "leakage"
            self._tell(Problem(kind, f"the same as {whole.named(earlier, here)}"), at)
            return
        if len(whole.files) > 1:
            question = question_of(row, format)
            if question:
                earlier = whole.questions.first(digest(canonical(question)), place)
                if earlier is not None and whole.place(earlier)[0] != here:
                    self._tell(Problem("prompt-leakage", f"asked in {whole.named(earlier, here)}, too"), at)
        if whole.near is not None:
            whole.near.add(_compared_text(content, format), place)

    def _note_types(self, row: Mapping[str, Any], at: _At) -> None:
        for column, value in row.items():
            if value is not None and (column in self.types or len(self.types) < _COLUMNS):
                kind = _COLUMN_TYPES.get(type(value), "other")
                seen = self.types.setdefault(column, {}).setdefault(kind, _Seen(at))
                seen.rows += 1

    def _tell_types(self, column: str, types: dict[str, _Seen]) -> None:
        """The rarer types of a column, each at the first row that has it."""
        usual = max(types, key=lambda name: types[name].rows)
        for name, seen in types.items():
            if name != usual:
                what = f"'{visible(column, 40)}' is {name} in {seen.rows:,} and {usual} in {types[usual].rows:,} rows"
                self._tell(Problem("mixed-types", what, visible(column, 40)), seen.first)

    def _tell(self, problem: Problem, at: _At, record: Record | None = None) -> None:
        sample = ""
        if record is not None and record.original:
            sample = visible(record.original[: _SAMPLE_CHARS * 4].decode("utf-8", "replace"), _SAMPLE_CHARS)
        self.whole.tell(problem, self.index, at, sample)


_COLUMN_TYPES = {
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def _sample(row: Any, texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The beginnings of a row's texts by field, of a conversation by role."""
    columns = row if isinstance(row, Mapping) else {}
    messages: list[Any] = next(
        (columns[name] for name in CHAT_COLUMNS if isinstance(columns.get(name), list)), []
    )
    told = [
        (message.get("role") or message.get("from"), message.get("content") or message.get("value"))
        for message in messages
        if isinstance(message, Mapping)
    ]
    turns = [(str(role), text) for role, text in told if isinstance(text, str)]
    return [(name, text[: _SAMPLE_CHARS * 4]) for name, text in (turns or texts)[:12]]


def _compared_text(content: Any, format: Format | None) -> str:
    """What two rows are compared by: their texts, without the system message, which all may share."""
    if format in ("messages", "sharegpt") and isinstance(content, list) and isinstance(content[0], list):
        content = [message for message in content[0] if message[0] not in ("system", "developer")]
        return "\n".join(text for message in content for _, text in texts_of(message[1:]))
    return "\n".join(text for _, text in texts_of(content))
