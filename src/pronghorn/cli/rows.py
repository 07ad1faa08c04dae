"""Rows for ``pronghorn train``: a file, a folder, a hub id, or the docstrings of Python's own library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pronghorn.config import RunConfig
from pronghorn.errors import ConfigInvalid

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(config: RunConfig) -> tuple[Any, Any | None]:
    """(training rows, held-back rows or None) as `datasets.Dataset`.

    Raises:
        ConfigInvalid: there is no such data, it cannot be read, or fewer rows than are held back.
    """
    rows = _all_rows(config)
    section = config.data
    if section.limit is not None:
        rows = rows.select(range(min(section.limit, len(rows))))
    if section.text_field is not None and section.text_field not in rows.column_names:
        raise ConfigInvalid(
            f"the rows have no column '{section.text_field}'",
            where=config.where("data.text_field"),
            fix=f"their columns are {', '.join(rows.column_names)}",
        )
    if not section.held_back:
        return rows, None
    if section.held_back >= len(rows):
        raise ConfigInvalid(
            f"{section.held_back} rows are to be held back of only {len(rows)}",
            where=config.where("data.held_back"),
            fix="hold back fewer",
        )
    parts = rows.train_test_split(test_size=section.held_back, seed=config.training.seed)
    return parts["train"], parts["test"]


def _all_rows(config: RunConfig) -> Any:
    import datasets

    name, section, where = config.data.dataset, config.data, config.where("data.dataset")
    if name == "docstrings":
        from pronghorn.data.docstrings import docstring_rows

        return datasets.Dataset.from_list([{"messages": row.messages()} for row in docstring_rows()])
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if suffix in _READERS and not path.is_file():
        raise ConfigInvalid(f"there is no file '{name}'", where=where, fix="check 'data.dataset'")
    if path.is_file() and suffix not in _READERS:
        raise ConfigInvalid(
            f"'{name}' is not a kind of file that is read", where=where, fix=f"one of {', '.join(_READERS)}"
        )
    try:
        if path.is_file():
            return datasets.load_dataset(_READERS[suffix], data_files=str(path), split="train")
        if path.is_dir() and any((path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(str(path))
            return saved[section.split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(
            str(path) if path.is_dir() else name, section.subset, split=section.split
        )
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        raise ConfigInvalid(
            f"the rows of '{name}' cannot be read: {reason[0] if reason else type(error).__name__}",
            where=where,
            fix="check the file, or the name and your connection for a hub id",
        ) from error
