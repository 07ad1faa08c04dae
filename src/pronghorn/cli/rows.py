"""Rows for ``pronghorn train``: files, a folder, a hub id, or the docstrings of Python's own library."""

from __future__ import annotations

import dataclasses
import logging
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pronghorn.cli.console import first_line
from pronghorn.cli.row_files import Places, folder_files, named_files, rows_of_split
from pronghorn.config import RunConfig
from pronghorn.data.checks.formats import format_of, problems_of
from pronghorn.data.reading import KINDS, Problem, Record, RowFile, level_of
from pronghorn.data.rows import CHAT_COLUMNS, row_kind
from pronghorn.errors import ConfigInvalid, PronghornError, RowInvalid, RowsUnreadable

logger = logging.getLogger("pronghorn")

#: What other readers take as it stands, too, and what has one meaning only.
_CLEAR = ("bom", "array-in-jsonl", "concatenated", "split-row", "nan")
#: Columns with the texts of rows; others, such as images, need not be read to look at these.
_TEXT_COLUMNS = (
    *CHAT_COLUMNS, "prompt", "completion", "instruction", "input", "output", "response", "system", "chosen", "rejected",
)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """`datasets.Dataset`s, and for each of their rows its number in the source, so that a message can name its line."""

    train: Any
    held_back: Any | None
    train_numbers: list[int]
    held_back_numbers: list[int]
    places: Places
    held_back_places: Places

    @property
    def are_chats(self) -> bool:
        """Whether there are rows of which only the assistant's turns are to be trained on: conversations, whole or as
        the completion of a prompt."""
        columns = [name for name in (*CHAT_COLUMNS, "completion") if name in self.train.column_names]
        return any(
            isinstance(turns, list) and (name != "completion" or len(turns) > 1)
            for name in columns
            for turns in self.train[name]
        )

    @contextmanager
    def naming_lines(self) -> Iterator[None]:
        """Put the file, and its line or row, in place of ``row N of the train data`` into errors."""
        try:
            yield
        except PronghornError as error:
            match = re.match(r"row (\d+) of the (train|eval)\w* data", error.where)
            trained = match is None or match[2] == "train"
            places = self.places if trained else self.held_back_places
            if match is not None and places.files:
                numbers = self.train_numbers if trained else self.held_back_numbers
                error.where = places.of_row(numbers[int(match[1])])
                # Numbers of further rows would be those of the rows that are left once some are held back.
                error.message = re.sub(r": rows \d+(, (\d+|…))*$", "", error.message)
            raise


def load_rows(config: RunConfig) -> Rows:
    """The rows a configuration names, with those to evaluate on: the ones that are held back, set aside by
    ``training.seed``, or other ones.

    Raises:
        ConfigInvalid: there is no such data, or fewer rows than are held back.
        RowsUnreadable: it cannot be read, with the line for a .jsonl file.
        RowInvalid: a text is empty, which `pronghorn data check` calls an error, too.
    """
    section = config.data
    if section.eval_split and section.eval_dataset is None:
        _refuse_without_splits(config)
    rows, places, numbers = _checked_rows(config)
    if section.eval_dataset is not None or section.eval_split:
        others, other_places, held = _checked_rows(_of_evaluation(config))
        return Rows(rows.select(numbers), others.select(held), numbers, held, places, other_places)
    if section.held_back >= len(numbers):
        raise ConfigInvalid(
            f"{section.held_back} rows are to be held back of only {len(numbers)}",
            where=config.where("data.held_back"),
            fix="hold back fewer",
        )
    if section.held_back:
        random.Random(config.training.seed).shuffle(numbers)
    held, trained = numbers[: section.held_back], numbers[section.held_back :]
    return Rows(rows.select(trained), rows.select(held) if held else None, trained, held, places, places)


def _refuse_without_splits(config: RunConfig) -> None:
    """Raise where ``data.eval_split`` names a split of rows that have none, and would be evaluated on all that is
    trained on."""
    given = config.data.dataset
    saved = isinstance(given, str) and (Path(given).expanduser() / "state.json").exists()
    if given == "docstrings" or saved or named_files(config):
        raise ConfigInvalid(
            f"'data.eval_split' names a split, and '{_shown(config)}' has none",
            where=config.where("data.eval_split"),
            fix="name other rows in data.eval_dataset, or set data.held_back to how many are held back",
        )


def _of_evaluation(config: RunConfig) -> RunConfig:
    """The configuration with the rows to evaluate on in the place of those to train on."""
    section, lines = config.data, dict(config.lines)
    named = "eval_split" if section.eval_dataset is None else "eval_dataset"
    if f"data.{named}" in lines:
        lines["data.dataset"] = lines[f"data.{named}"]
    if "data.eval_split" in lines:
        lines["data.split"] = lines["data.eval_split"]
    other = dataclasses.replace(
        section,
        dataset=section.dataset if section.eval_dataset is None else section.eval_dataset,
        split=section.eval_split or "train",
        limit=None,
    )
    return dataclasses.replace(config, data=other, lines=lines)


def _checked_rows(config: RunConfig) -> tuple[Any, Places, list[int]]:
    """All rows that were read, where they stand, and the numbers of those that are wanted and sound."""
    rows, places, chosen = _all_rows(config)
    section = config.data
    _refuse_bytes(rows, places, config)
    count = min(len(chosen), section.limit or len(chosen))
    if not count:
        raise RowsUnreadable(
            f"'{_shown(config)}' has no rows", where=config.where("data.dataset"), fix="name other data"
        )
    for file, start, size in zip(places.files, places.starts, places.counts, strict=True):
        if size == 1:
            _refuse_nested(rows[start], file)
    if section.text_field is not None and section.text_field not in rows.column_names:
        raise ConfigInvalid(
            f"the rows have no column '{section.text_field}'",
            where=config.where("data.text_field"),
            fix=f"their columns are {', '.join(rows.column_names)}",
        )
    return rows, places, _with_texts(rows, list(chosen[:count]), config, places)


def _shown(config: RunConfig) -> str:
    """What ``data.dataset`` names, for a message."""
    given = config.data.dataset
    return given if isinstance(given, str) else ", ".join(given)


def _refuse_bytes(rows: Any, places: Places, config: RunConfig) -> None:
    """Raise for texts that are no UTF-8, which Parquet and Arrow files may hold: else the first use of one would.

    Raises:
        RowsUnreadable: with the row for a file.
    """
    from pyarrow import ArrowInvalid  # type: ignore[import-untyped]

    try:
        rows.data.validate(full=True)
    except ArrowInvalid as error:
        for file in places.files:
            raise_for_first_bad_row(file)
        raise RowsUnreadable(
            f"the rows of '{_shown(config)}' hold what is no text: {first_line(error)}",
            where=config.where("data.dataset"),
            fix="write its texts in UTF-8",
        ) from None


def _with_texts(rows: Any, numbers: list[int], config: RunConfig, places: Places) -> list[int]:
    """The numbers of rows without an empty text. An empty answer has a token to train on, the end of the turn, so the
    trainer takes it; what it teaches is to say nothing.

    Raises:
        RowInvalid: there are others, and ``training.drop_unsupervised_rows`` does not leave them out.
    """
    field = config.data.text_field or "text"
    columns = [name for name in rows.column_names if name in (*_TEXT_COLUMNS, field)]
    if not columns or "input_ids" in rows.column_names:
        return numbers
    texts = rows.select_columns(columns)
    empty: dict[int, str] = {}
    for number in numbers:
        row = texts[number]
        found = [p.what for p in problems_of(row, format_of(row, field), field) if p.kind == "empty-field"]
        if found:
            empty[number] = found[0]
    if not empty:
        return numbers
    if config.training.other.get("drop_unsupervised_rows"):
        logger.warning("pronghorn: %d of %d rows with an empty text are left out", len(empty), len(numbers))
        return [number for number in numbers if number not in empty]
    number, what = next(iter(empty.items()))
    if len(empty) > 1:
        what += f", and so it is in {len(empty) - 1} further rows"
    place = places.of_row(number)
    if not places.files:
        raise RowInvalid(what, where=place, fix="--set training.drop_unsupervised_rows=true leaves them out")
    file, _ = places.file(number)
    clean = f"pronghorn data clean {file} {file.with_name(f'{file.stem}-clean.jsonl')}"
    raise RowInvalid(what, where=place, fix=f"write them, or set such rows aside: {clean}")


def _all_rows(config: RunConfig) -> tuple[Any, Places, Sequence[int]]:
    """All rows that were read, where they stand, and the numbers of those that ``data.split`` means."""
    import datasets

    name, section, where = config.data.dataset, config.data, config.where("data.dataset")
    if name == "docstrings":
        from pronghorn.data.docstrings import docstring_rows

        rows = datasets.Dataset.from_list([{"messages": row.messages()} for row in docstring_rows()])
        return rows, Places(), _part_of(rows, config)
    files = named_files(config)
    if files and files[0].suffix.lower() != ".parquet":
        rows, places = _of_files(files, config)
        return rows, places, _part_of(rows, config)
    path = Path(str(name)).expanduser()  # no list, where there are no files
    try:
        if files:
            rows = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
            return rows, Places(tuple(files), tuple(map(_parquet_rows, files))), _part_of(rows, config)
        if path.is_dir() and any((path / mark).exists() for mark in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.DatasetDict):
                saved = saved[section.split]
                return saved, Places(), range(len(saved))
            return saved, Places(), _part_of(saved, config)
        inside = folder_files(path, section.subset, section.split) if path.is_dir() else None
        if inside is None:
            source = str(path) if path.is_dir() else name
            rows = datasets.load_dataset(source, section.subset, split=section.split)
            return rows, Places(), range(len(rows))
        found = [file for of_split in inside.values() for file in of_split]
        rows, places = _of_files(found, config)
        return rows, places, rows_of_split(inside, places.counts, section.split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        for file in files:
            raise_for_first_bad_row(file)
        raise RowsUnreadable(
            f"the rows of '{_shown(config)}' cannot be read: {first_line(error.__cause__ or error)}",
            where=where,
            fix="check the file, or the name and your connection for a hub id",
        ) from error


def _part_of(rows: Any, config: RunConfig) -> Sequence[int]:
    """The numbers of rows without splits that ``data.split`` means: ``train`` is all of them, ``train[:90%]`` a part.

    Raises:
        ConfigInvalid: it names another split.
    """
    split = config.data.split
    try:
        return rows_of_split({"train": [Path()]}, [len(rows)], split)
    except ValueError as error:
        raise ConfigInvalid(
            f"the split '{split}' is asked for, and all rows of '{_shown(config)}' are 'train': {first_line(error)}",
            where=config.where("data.split"),
            fix="leave it out, or name a part of them such as train[:90%]",
        ) from None


def _parquet_rows(file: Path) -> int:
    from pyarrow import parquet

    return int(parquet.read_metadata(file).num_rows)


def _of_files(files: Sequence[Path], config: RunConfig) -> tuple[Any, Places]:
    """The rows of JSON or CSV files.

    Raises:
        RowsUnreadable: for the first row that is broken, with its place; or they cannot be stored.
    """
    import datasets

    from pronghorn.data.row_dataset import dataset_of

    try:
        rows, counts = dataset_of(files, _refuse)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise RowsUnreadable(
            f"the rows of '{_shown(config)}' cannot be stored: {first_line(error.__cause__ or error)}",
            where=config.where("data.dataset"),
            fix="see that the disk of the cache (HF_HOME) has room",
        ) from error
    return rows, Places(tuple(files), tuple(counts))


def _refuse(file: RowFile, record: Record | None) -> None:
    """Raise for a record that is no row as it stands; None: for what is wrong with the file as a whole.

    Raises:
        RowsUnreadable: with the file and line.
    """
    if record is None:
        for line, problem in file.told:
            if level_of(problem) == "error" and problem.kind not in _CLEAR:
                raise _unreadable(problem, f"{file.path}, line {line}" if line else str(file.path), file)
        return
    where = record.place(str(file.path))
    if record.problem is not None:
        raise _unreadable(record.problem, where, file)
    unclear = [kind for kind in record.repairs if kind not in _CLEAR]
    if unclear:
        raise _unreadable(Problem(unclear[0], KINDS[unclear[0]].title), where, file)
    if not isinstance(record.value, dict):
        raise RowsUnreadable(
            "this line is not a row", where=where, fix='write each row as an object: {"messages": ...}'
        )


def _refuse_nested(row: dict[str, Any], file: Path) -> None:
    """Raise for a file that holds its rows inside an object, such as ``{"data": [...]}``."""
    for key, value in row.items():
        inside = value if isinstance(value, list) else []
        if row_kind(row) is None and inside and isinstance(inside[0], dict):
            raise RowsUnreadable(
                f"the file is one object, and the rows are the {len(inside)} objects inside '{key}'",
                where=str(file),
                fix="write the list of rows itself into the file",
            )


def raise_for_first_bad_row(path: Path) -> None:
    """Raise for the first row of a file that is broken.

    Raises:
        RowsUnreadable: with the file and line.
    """
    file = RowFile(path)
    for record in file.records():
        _refuse(file, record)
    _refuse(file, None)


_NOT_WHAT = {"CSV": "not a row of the table", "Parquet": "not readable", "plain text": "not text"}


def _unreadable(problem: Problem, where: str, file: RowFile) -> RowsUnreadable:
    """The error for a problem, with the command that puts it right where one does."""
    kind = KINDS[problem.kind]
    command = f"pronghorn data clean {file.path} {file.path.with_name(f'{file.path.stem}-clean.jsonl')}"
    fix = command if kind.repaired else kind.fix
    if problem.kind == "not-utf-8":
        fix = f"{command} --encoding cp1252, or whichever encoding it has"
    what = problem.what
    if problem.kind != "unreadable":  # which names the file itself
        what = f"this line is {_NOT_WHAT.get(file.container, 'not JSON')}: {what}"
    return RowsUnreadable(what, where=where, fix=fix)
