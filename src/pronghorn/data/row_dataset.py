"""Files of rows as a `datasets.Dataset`, read by the code that checks it: what `pronghorn data` sees is trained on.

`datasets` takes the types of columns from the first 10 MB of a file, so that a key that appears later stops it, and it
makes dates and numbers of texts that look like them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets.features import Json

from pronghorn.data.reading import Record, RowFile

#: Part of the key under which rows are kept between runs; another one for other contents.
_FORM = 2
_INT64 = range(-(2**63), 2**63)
_SCALARS: dict[type, str] = {str: "string", bool: "bool", int: "int64", float: "float64", type(None): "null"}


def dataset_of(
    paths: Sequence[Path], check: Callable[[RowFile, Record | None], None]
) -> tuple[Dataset, list[int]]:
    """The rows of JSON or CSV files, memory-mapped, and how many each file has. Fields of a CSV file are texts; what
    JSON nests stays as it is.

    Args:
        check: is given every record that is not simply a row, and None after a file's last; raises for what is refused.

    Raises:
        RowsUnreadable, CommandMisused: a file cannot be opened, or is of no kind that is read.
    """
    kinds: dict[str, set[str]] = {}
    counts = []
    for path in paths:
        file, count = RowFile(path), 0
        for record in file.records():
            if record.problem is not None or record.repairs or not isinstance(record.value, dict):
                check(file, record)
            if isinstance(record.value, dict):
                count += 1
                for column, value in record.value.items():
                    kinds.setdefault(column, set()).add(_kind(value))
        check(file, None)
        counts.append(count)
    if not kinds:
        return Dataset.from_dict({}), counts
    features = Features({column: _feature(found - {"null"}) for column, found in kinds.items()})
    encoded = [column for column, feature in features.items() if isinstance(feature, Json)]
    facts = [(str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
    rows = Dataset.from_generator(
        _rows,
        features=features,
        gen_kwargs={
            "files": tuple(facts),
            "form": _FORM,
            "columns": tuple(features),
            "encoded": tuple(encoded),
        },
    )
    return rows, counts


def _rows(
    files: tuple[tuple[str, int, int], ...], columns: tuple[str, ...], encoded: tuple[str, ...], **_: Any
) -> Iterator[dict[str, Any]]:
    """Rows with all columns; those of several types or of nested values as JSON."""
    for record in (record for path, *_ in files for record in RowFile(path).records()):
        if not isinstance(record.value, dict):
            continue
        row = dict.fromkeys(columns) | record.value
        for column in encoded:
            if row[column] is not None:
                row[column] = json.dumps(row[column], ensure_ascii=False)
        yield row


def _feature(kinds: set[str]) -> Any:
    """What holds all kinds of values of a column."""
    if not kinds:
        return Value("null")
    lists = {kind for kind in kinds if kind.startswith("list of ")}
    if len(lists) == 1 and kinds - lists == {"empty list"}:  # which is one of any type
        kinds = lists
    kind = next(iter(kinds)) if len(kinds) == 1 else "json"
    if kind.startswith("list of "):
        return List(Value(kind.removeprefix("list of ")))
    return Json() if kind in ("json", "empty list") else Value(kind)


def _kind(value: Any) -> str:
    """How a value can be held: a scalar type, a list of one, or JSON."""
    if isinstance(value, list):
        if not value:
            return "empty list"
        first = type(value[0])
        if first in (int, str) and all(type(item) is first for item in value):
            return f"list of {_SCALARS[first]}" if first is str or _small(value) else "json"
        return "json"
    if type(value) is int and value not in _INT64:
        return "json"
    return _SCALARS.get(type(value), "json")


def _small(numbers: list[int]) -> bool:
    return min(numbers) in _INT64 and max(numbers) in _INT64
