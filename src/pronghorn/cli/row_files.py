"""Which files the rows of ``pronghorn train`` come from, and in which file and line one of them stands."""

from __future__ import annotations

import glob
import logging
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from pronghorn.config import RunConfig
from pronghorn.data.reading import RowFile
from pronghorn.errors import ConfigInvalid, RowsUnreadable

logger = logging.getLogger("pronghorn")

READERS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_JSON_LINES = (".jsonl", ".ndjson")
#: Files of a folder of rows that hold none.
_NO_ROWS = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")


@dataclass(frozen=True)
class Places:
    """Where rows stand.

    Args:
        files: in order; none for rows that are in no file of a known kind.
        counts: how many rows each has.
    """

    files: tuple[Path, ...] = ()
    counts: tuple[int, ...] = ()

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The number of each file's first row among all rows, from 0."""
        return tuple(accumulate(self.counts, initial=0))[:-1]

    def file(self, number: int) -> tuple[Path, int]:
        """The file of a row, and the row's number in it, from 0."""
        index = bisect_right(self.starts, number) - 1
        return self.files[index], number - self.starts[index]

    def of_row(self, number: int) -> str:
        """Where a row stands, for a message."""
        if not self.files:
            return f"row {number + 1}"
        path, row = self.file(number)
        lines = path.suffix.lower() in _JSON_LINES
        return f"{path}, line {_line_of_row(path, row)}" if lines else f"{path}, row {row + 1}"


def _line_of_row(path: Path, number: int) -> int:
    """The line in which row ``number`` (from 0) of a .jsonl file begins; empty lines hold none."""
    rows = (record for record in RowFile(path).records() if record.value is not None)
    return next(islice(rows, number, None)).line


def named_files(config: RunConfig) -> list[Path]:
    """The files that ``data.dataset`` names: one, a list of them, or a pattern; none where it names something else.

    Raises:
        ConfigInvalid: one that is not there, or of no kind that is read, or of another kind than the others.
        RowsUnreadable: the only one is empty.
    """
    given, where = config.data.dataset, config.where("data.dataset")
    names = [given] if isinstance(given, str) else given
    if not names:
        raise ConfigInvalid("'data.dataset' names no file", where=where, fix="name files of rows")
    files: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        as_files = isinstance(given, list) or path.suffix.lower() in READERS or "*" in name
        if path.is_file() or not as_files:
            found = [path] if path.is_file() else []
        else:
            found = sorted(
                Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()
            )
            if not found and not path.is_dir():
                raise ConfigInvalid(f"there is no file '{name}'", where=where, fix="check 'data.dataset'")
            if not found:
                raise ConfigInvalid(
                    f"'{name}' is a folder, and a list names files",
                    where=where,
                    fix=f"name its files: {path / '*.jsonl'}",
                )
        for file in found:
            _check_kind(file, where)
        files += found
    if len(files) == 1 and not files[0].stat().st_size:
        raise RowsUnreadable(f"'{files[0]}' is empty", where=where, fix="name other data")
    if len({file.suffix.lower() == ".parquet" for file in files}) > 1:
        raise ConfigInvalid(
            "Parquet files and others are not read together",
            where=where,
            fix="write them in one kind: `pronghorn data clean rows.parquet rows.jsonl` makes JSON Lines",
        )
    return list(dict.fromkeys(files))


def _check_kind(file: Path, where: str) -> None:
    if file.suffix.lower() not in READERS:
        RowFile(file)  # refuses what cannot be cleaned either
        raise ConfigInvalid(
            f"'{file}' is not a kind of file that is read",
            where=where,
            fix=f"one of {', '.join(READERS)}; `pronghorn data clean {file} rows.jsonl` writes one",
        )


def folder_files(folder: Path, subset: str | None, split: str) -> dict[str, list[Path]] | None:
    """The JSON or CSV files of a folder by the splits that `split` names, as `datasets` divides them: by their names,
    or by a README.md. None where it is `datasets`' to read them.

    Raises:
        OSError, ValueError: the folder has no data files, or is described in a way that cannot be followed.
    """
    import datasets

    builder = datasets.load_dataset_builder(str(folder), subset)
    settings: Any = builder.config
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in ("json", "csv") or getattr(settings, "field", None) is not None:
        return None
    files = {str(name): [Path(file) for file in found] for name, found in settings.data_files.items()}
    every = [file for found in files.values() for file in found]
    if any(file.suffix.lower() not in READERS or not file.is_file() for file in every):
        return None
    if not (folder / "README.md").exists():
        _tell_left_out(folder, every)
    wanted = {name: found for name, found in files.items() if re.search(rf"\b{re.escape(name)}\b", split)}
    if not wanted:
        raise ValueError(f"there is no split '{split}', only {', '.join(files)}")
    return wanted


def _tell_left_out(folder: Path, files: list[Path]) -> None:
    """Files of rows that `datasets` passes over: those of a second kind, and those without the name of a split beside
    others that have one."""
    read = {file.resolve() for file in files}
    others = sorted(
        name
        for path in folder.rglob("*")
        if path.suffix.lower() in READERS and path.resolve() not in read and path.name not in _NO_ROWS
        if not (name := str(path.relative_to(folder))).startswith(".")
    )
    if others:
        logger.warning(
            "pronghorn: of '%s' these files are in no split and left out: %s%s; a list in data.dataset reads them, too",
            folder, ", ".join(others[:3]), ", …" if len(others) > 3 else "",
        )  # fmt: skip


def rows_of_split(files: dict[str, list[Path]], counts: Sequence[int], split: str) -> Sequence[int]:
    """The numbers of the rows, of all that the files have one after the other, that a split such as ``train[:10%]``
    or ``train+test`` means.

    Raises:
        ValueError: it cannot be read, or names another split, too.
    """
    import datasets

    sizes: dict[str, int] = {}
    rows: dict[str, range] = {}
    left = iter(counts)
    for name, found in files.items():
        sizes[name] = sum(next(left) for _ in found)
        before = sum(len(numbers) for numbers in rows.values())
        rows[name] = range(before, before + sizes[name])
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    return [number for part in parts for number in rows[part.splitname][part.from_ : part.to]]


def refuse_no_held_back(config: RunConfig) -> None:
    """For commands whose score is the loss of rows that are held back.

    Raises:
        ConfigInvalid: there are none.
    """
    if not config.data.evaluates:
        raise ConfigInvalid(
            "no rows are held back, and without them there is no score",
            where=config.where("data.held_back"),
            fix="--set data.held_back=64",
        )
