"""The rows of a file that has to be sound, for who does not report on all that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pronghorn.data.reading.files import RowFile
from pronghorn.data.reading.problems import KINDS, level_of
from pronghorn.errors import RowsUnreadable


def readable_rows(file: RowFile) -> Iterator[tuple[Any, str]]:
    """The rows of a file, each with where it stands.

    Raises:
        RowsUnreadable: for the first that cannot be read.
    """
    for record in file.records():
        where = record.place(file.name)
        if record.problem is not None:
            fix = KINDS[record.problem.kind].fix
            raise RowsUnreadable(f"this row cannot be read: {record.problem.what}", where=where, fix=fix)
        if record.value is not None:
            yield record.value, where
    for line, problem in file.told:
        if level_of(problem) == "error":
            where = f"{file.name}, line {line}" if line else file.name
            raise RowsUnreadable(problem.what, where=where, fix=KINDS[problem.kind].fix)
