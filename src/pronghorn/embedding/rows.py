"""Rows of pairs: a text, what belongs to it, what does not, or how alike two texts are. From files or from memory."""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pronghorn.data.docstrings import docstring_rows
from pronghorn.data.reading import RowFile, readable_rows
from pronghorn.errors import CommandMisused, RowInvalid, RowsUnreadable

#: Column names of the two texts of a row, and of the number that says how alike they are.
PAIRS = (("anchor", "positive"), ("query", "document"), ("sentence1", "sentence2"))
SCORE = "score"
_NEGATIVE = re.compile(r"negatives?(_?\d+)?$")
_SHAPES = '{"anchor": …, "positive": …}, {"query": …, "document": …}, or {"sentence1": …, "sentence2": …, "score": …}'


@dataclass(frozen=True)
class Pair:
    """One row. `score` is how alike anchor and positive are; None where they simply belong together."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()
    score: float | None = None


def read_pairs(files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Pair]:
    """The rows of JSON Lines, JSON, CSV or Parquet files; "docstrings" stands for Python's own library.

    Raises:
        CommandMisused: a file is not there, or of no kind that is read.
        RowsUnreadable, RowInvalid: with the file and the line.
    """
    names = [files] if isinstance(files, str | os.PathLike) else list(files)
    pairs: list[Pair] = []
    for name in names:
        pairs += docstring_pairs() if str(name) == "docstrings" else _read_file(RowFile(name))
    _check_all(pairs, ", ".join(str(name) for name in names))
    return pairs


def as_pairs(rows: Iterable[Mapping[str, Any] | Pair], what: str = "train") -> list[Pair]:
    """Rows in memory (dictionaries, a `datasets.Dataset`) as pairs.

    Raises:
        RowInvalid: with the number of the row, from 0.
    """
    pairs = [
        row if isinstance(row, Pair) else pair_of(row, f"row {index} of the {what} data")
        for index, row in enumerate(rows)
    ]
    _check_all(pairs, f"the {what} data")
    return pairs


def pair_of(row: Any, where: str) -> Pair:
    """One row as a pair.

    Raises:
        RowInvalid: columns are missing, or hold something else than they should.
    """
    if not isinstance(row, Mapping):
        raise RowInvalid("the row is no object with columns", where=where, fix=f"write {_SHAPES}")
    names = next((pair for pair in PAIRS if row.get(pair[0]) is not None), None)
    if names is None:
        columns = ", ".join(map(str, row)) or "none"
        raise RowInvalid(
            f"the row has no text to embed (columns: {columns})", where=where, fix=f"write {_SHAPES}"
        )
    anchor, positive = (_text(row, name, where) for name in names)
    negatives = []
    for name in (name for name in row if isinstance(name, str) and _NEGATIVE.match(name)):
        values = row[name] if isinstance(row[name], list | tuple) else [row[name]]
        negatives += [_text({name: value}, name, where) for value in values if value is not None]
    return Pair(anchor, positive, tuple(negatives), _score(row, where))


def docstring_pairs(library: Path | None = None) -> list[Pair]:
    """Signatures of Python's own library, or of one in another folder, with what their docstrings say: real text on
    every machine."""
    rows = docstring_rows(library)
    signatures = (re.search(r"`(.*)`", row.question) for row in rows)
    return [
        Pair(row.name if found is None else found[1], row.answer)
        for row, found in zip(rows, signatures, strict=True)
    ]


def hold_back(pairs: Sequence[Pair], count: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training rows, `count` held-back rows). Rows that share a text with a held-back one go to neither part.

    Raises:
        CommandMisused: nothing would be left to train on.
    """
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    held = [pairs[index] for index in sorted(order[:count])]
    known = {text for pair in held for text in (pair.anchor, pair.positive)}
    rest = [pairs[index] for index in sorted(order[count:])]
    train = [pair for pair in rest if pair.anchor not in known and pair.positive not in known]
    if not train:
        raise CommandMisused(
            f"{count} rows are to be held back, and none of {len(pairs)} is left to train on",
            fix="hold back fewer",
        )
    return train, held


def read_texts(file: str | os.PathLike[str], column: str = "text") -> list[str]:
    """One text a line of a .txt file, or what stands in a column of a file of rows.

    Raises:
        CommandMisused: the file is not there, or of no kind that is read.
        RowsUnreadable, RowInvalid: with the file and the line.
    """
    texts = []
    for row, where in readable_rows(RowFile(file)):
        if not isinstance(row, Mapping) or not isinstance(row.get(column), str):
            columns = ", ".join(map(str, row)) if isinstance(row, Mapping) else "none"
            raise RowInvalid(
                f"the row has no text in '{column}' (columns: {columns})",
                where=where,
                fix="name its column with --field",
            )
        texts.append(_text(row, column, where))
    if not texts:
        raise RowsUnreadable("there are no texts", where=str(file), fix="name another file")
    return texts


def _read_file(file: RowFile) -> Iterator[Pair]:
    for row, where in readable_rows(file):
        yield pair_of(_of_table(row) if file.container == "CSV" else row, where)


def _of_table(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of a table, whose cells are texts: an empty negative is none, and a score a number where it is one."""
    row = {name: cell for name, cell in row.items() if cell.strip() or not _NEGATIVE.match(name)}
    cell = row.get(SCORE)
    try:
        return {**row, SCORE: float(cell)} if isinstance(cell, str) and cell.strip() else row
    except ValueError:
        return row


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    text = row.get(name)
    if not isinstance(text, str) or not text.strip():
        found = (
            "missing" if text is None else "empty" if isinstance(text, str) else f"a {type(text).__name__}"
        )
        raise RowInvalid(f"'{name}' is {found}", where=where, fix=f"give every row a text there: {_SHAPES}")
    return text


def _score(row: Mapping[str, Any], where: str) -> float | None:
    score = row.get(SCORE)
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise RowInvalid(
            f"'{SCORE}' is {score!r}, which is no number", where=where, fix="give a number, such as 0.8"
        )
    return float(score)


def _check_all(pairs: Sequence[Pair], where: str) -> None:
    """Raises:
    RowsUnreadable: there are none. RowInvalid: some have a score and some have none.
    """
    if not pairs:
        raise RowsUnreadable("there are no rows", where=where, fix="name other data")
    scored = [pair.score is not None for pair in pairs]
    if any(scored) and not all(scored):
        number = scored.index(not scored[0])
        raise RowInvalid(
            f"row {number} has {'a' if scored[number] else 'no'} score and the rows before it have "
            f"{'none' if scored[number] else 'one'}",
            where=where,
            fix="train on pairs and on scored pairs one after the other",
        )
