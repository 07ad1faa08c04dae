"""A data set to token rows that a `Collator` takes: rendered, truncated, checked and, if asked, packed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, Features, IterableDataset, LargeList, List, Value

from pronghorn.data.packing import best_fit_decreasing
from pronghorn.data.rows import RowRenderer, supervised
from pronghorn.errors import DatasetUnusable, NothingSupervised, PronghornError, RowInvalid, SequenceTooLong

logger = logging.getLogger("pronghorn")

#: Documents looked at together when a stream is packed.
STREAM_WINDOW = 1024
_TOKENS = List(Value("int32"))
_FEATURES = Features(
    {
        "input_ids": _TOKENS,
        "labels": _TOKENS,
        "rows": List(Value("int64")),
        "length": Value("int64"),
        "total": Value("int64"),
        "kept": Value("int64"),
    }
)


@dataclass(frozen=True)
class Preparation:
    """How a data set is prepared.

    Args:
        max_length: rows are cut to it; also the capacity of a packed row. None cuts nothing.
        keep_end: cut the beginning instead of the end.
        context: the model's longest sequence, where known; a longer row is an error.
        packing: put whole documents together into rows of `max_length` tokens.
        drop_unsupervised: leave out rows without a token to train on, which are an error otherwise.
        workers: processes that render rows.
        formatting_func: one row to its text, or a batch of rows to a list of texts.
        shuffle_seed: shuffle the rows first; None keeps their order.
    """

    renderer: RowRenderer
    max_length: int | None = None
    keep_end: bool = False
    context: int | None = None
    packing: bool = False
    drop_unsupervised: bool = False
    workers: int | None = None
    formatting_func: Callable[..., Any] | None = None
    shuffle_seed: int | None = None


def prepare_dataset(dataset: Any, preparation: Preparation, name: str = "train") -> Any:
    """Rows of `input_ids`, `labels` and `rows` (packed: and `seq_lengths`), for a Dataset or a stream of rows.

    `rows` are the numbers that a row's documents have in the data as it was given, so that a step can name them.

    Raises:
        DatasetUnusable: it is empty, has a transform, or packing was asked for without a row length.
        NothingSupervised: rows without a token to train on, before any truncation.
        SequenceTooLong: a row longer than the model's context, with truncation turned off.
        PronghornError: whatever `RowRenderer` raises, with the row's number.
    """
    if preparation.packing and preparation.max_length is None:
        raise DatasetUnusable("packing needs a row length", fix="set max_length, or packing=False")
    first = next(iter(dataset), None)
    if first is None:
        raise DatasetUnusable(f"the {name} data has no rows", fix="check the data set and its split")
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        raise DatasetUnusable(
            f"the {name} data has a transform (with_transform), which preparing would run once and for all",
            fix="apply it with Dataset.map before, or give tokenised rows",
        )
    if "seq_lengths" in first:
        return dataset.select_columns(
            ["input_ids", "labels", "seq_lengths", *(["rows"] if "rows" in first else [])]
        )
    if preparation.formatting_func is not None and "input_ids" not in first:
        dataset = apply_formatting(dataset, preparation.formatting_func, preparation)
        first = next(iter(dataset))
    if isinstance(dataset, Dataset):
        return _prepare_rows(dataset, preparation, name)
    return _prepare_stream(dataset, list(first), preparation, name)


def apply_formatting(dataset: Any, function: Callable[..., Any], preparation: Preparation) -> Any:
    """A column of text made by the user's function.

    The function takes one row and returns its text (TRL), or takes columns of rows and returns a list of texts (older
    TRL, Unsloth's notebooks); which of them is found out with the first row.
    """
    first = dict(next(iter(dataset)))
    try:
        made = function(first)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError):
        made = None
    batched = not isinstance(made, str | Mapping) or (
        isinstance(made, Mapping) and not all(isinstance(v, str) for v in made.values())
    )
    text_field = preparation.renderer.form.text_field

    def texts(made: Any) -> Any:
        if isinstance(made, Mapping):
            made = made.get(text_field, next(iter(made.values()), None))
        return made

    if batched:
        probe = texts(function({key: [value] for key, value in first.items()}))
        if not isinstance(probe, list | tuple) or len(probe) != 1 or not isinstance(probe[0], str):
            raise RowInvalid(
                "formatting_func returns neither a text for a row nor one text each for a batch of rows",
                fix="return a str",
            )
    return dataset.map(
        lambda rows: {text_field: list(texts(function(rows))) if batched else texts(function(rows))},
        batched=batched,
        remove_columns=list(first),
        **({"num_proc": preparation.workers} if isinstance(dataset, Dataset) else {}),
    )


# --- data sets of known length ----------------------------------------------------------------------------------


def _prepare_rows(dataset: Dataset, preparation: Preparation, name: str) -> Dataset:
    place = _Place(name)
    rendered = dataset.map(
        _RenderRow(preparation, place),
        with_indices=True,
        remove_columns=dataset.column_names,
        features=_FEATURES,
        num_proc=preparation.workers,
        desc=f"Tokenizing {name} data",
    )
    counts = {key: np.asarray(rendered.with_format("numpy")[key]) for key in ("length", "total", "kept")}
    _refuse_too_long(counts["length"], preparation, place)
    empty = np.flatnonzero(counts["total"] == 0)
    if len(empty) and not preparation.drop_unsupervised:
        raise _nothing_supervised(empty, len(rendered), place)
    if preparation.max_length is not None:
        _note_truncation(counts, preparation.max_length, name)
    if len(empty):
        logger.warning(
            "pronghorn: %d rows of the %s data have no token to train on: left out", len(empty), name
        )
    kept = np.flatnonzero(counts["kept"] > 0)
    if not len(kept):
        raise NothingSupervised(
            f"no row of the {name} data keeps a token to train on within max_length={preparation.max_length}",
            fix="raise max_length",
        )
    rendered = rendered.select_columns(["input_ids", "labels", "rows"])
    if len(kept) < len(rendered):
        rendered = rendered.select(kept)
    if preparation.shuffle_seed is not None:
        rendered = rendered.shuffle(seed=preparation.shuffle_seed)
    if preparation.packing:
        assert preparation.max_length is not None
        return pack_dataset(rendered, preparation.max_length, name)
    return rendered


def pack_dataset(dataset: Dataset, capacity: int, name: str = "train") -> Dataset:
    """Documents (`input_ids`, `labels`, `rows`) put together into rows of at most `capacity` tokens, with
    `seq_lengths`."""
    table = dataset.with_format("arrow")[:]
    ids = _one_array(table.column("input_ids"))
    labels = _one_array(table.column("labels"))
    lengths = np.diff(ids.offsets.to_numpy())
    rows = best_fit_decreasing(lengths.tolist(), capacity)
    order = np.concatenate([np.asarray(documents, dtype=np.int64) for documents in rows])
    per_row = np.array([len(documents) for documents in rows], dtype=np.int64)
    ends = np.concatenate(([0], np.cumsum(lengths[order])))
    first_document = np.concatenate(([0], np.cumsum(per_row)))
    bounds = pa.array(ends[first_document], type=pa.int64())
    columns = {
        column: pa.LargeListArray.from_arrays(bounds, values.take(pa.array(order)).flatten())
        for column, values in (("input_ids", ids), ("labels", labels))
    }
    bounds = pa.array(first_document, type=pa.int64())
    columns["seq_lengths"] = pa.LargeListArray.from_arrays(bounds, pa.array(lengths[order].astype(np.int32)))
    numbers = _one_array(table.column("rows")).flatten().take(pa.array(order))
    columns["rows"] = pa.LargeListArray.from_arrays(bounds, numbers)
    logger.info(
        "pronghorn: %d documents of the %s data packed into %d rows of %d tokens, %.1f %% full",
        len(lengths), name, len(rows), capacity, 100 * ends[-1] / (len(rows) * capacity),
    )  # fmt: skip
    features = Features(
        {column: LargeList(Value("int64" if column == "rows" else "int32")) for column in columns}
    )
    return Dataset(pa.table(columns).cast(features.arrow_schema))


def _one_array(column: pa.ChunkedArray) -> pa.LargeListArray:
    """A list column as one array with offsets from 0; 64-bit, since tokens may number more than 2^31."""
    array = column.cast(pa.large_list(column.type.value_type)).combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    return pa.LargeListArray.from_arrays(
        pa.array(array.offsets.to_numpy() - array.offsets[0].as_py()), array.flatten()
    )


# --- streams ----------------------------------------------------------------------------------------------------


def _prepare_stream(dataset: IterableDataset, columns: list[str], preparation: Preparation, name: str) -> Any:
    """The same for rows that arrive one by one: a row without supervised tokens is met when it is read."""
    stream = dataset.map(
        _RenderRow(preparation, _Place(name), stream=True), with_indices=True, remove_columns=columns
    )
    stream = stream.filter(_keeps_tokens).remove_columns(["length", "total", "kept"])
    if preparation.shuffle_seed is not None:
        stream = stream.shuffle(seed=preparation.shuffle_seed, buffer_size=STREAM_WINDOW)
    if preparation.packing:
        assert preparation.max_length is not None
        stream = stream.map(
            _PackWindow(preparation.max_length),
            batched=True,
            batch_size=STREAM_WINDOW,
            remove_columns=["input_ids", "labels", "rows"],
        )
    return stream


def _keeps_tokens(row: Mapping[str, Any]) -> bool:
    return row["kept"] > 0


@dataclass(frozen=True)
class _PackWindow:
    """Packs a window of documents of a stream."""

    capacity: int

    def __call__(self, window: Mapping[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        lengths = [len(ids) for ids in window["input_ids"]]
        packed: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "seq_lengths": [], "rows": []}
        for documents in best_fit_decreasing(lengths, self.capacity):
            for column in ("input_ids", "labels", "rows"):
                packed[column].append([token for index in documents for token in window[column][index]])
            packed["seq_lengths"].append([lengths[index] for index in documents])
        return packed


# --- one row ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Names a row in messages."""

    name: str

    def __call__(self, index: int) -> str:
        return f"row {index} of the {self.name} data"


@dataclass
class _RenderRow:
    """Row to tokens: rendered, truncated, counted. `total` and `kept` are supervised tokens before and after."""

    preparation: Preparation
    place: _Place
    stream: bool = False
    told: set[str] = field(default_factory=set)

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        try:
            rendered = self.preparation.renderer(row)
        except PronghornError as error:
            error.where = f"{self.place(index)}; {error.where}" if error.where else self.place(index)
            raise
        ids, labels = rendered["input_ids"], rendered["labels"]
        length, total = len(ids), supervised(labels)
        limit = self.preparation.max_length
        if limit is not None and length > limit:
            cut = slice(-limit, None) if self.preparation.keep_end else slice(limit)
            ids, labels = ids[cut], labels[cut]
        if self.stream:
            self._check_in_stream(index, length, total)
        return {
            "input_ids": ids,
            "labels": labels,
            "rows": [index],
            "length": length,
            "total": total,
            "kept": supervised(labels),
        }

    def _check_in_stream(self, index: int, length: int, total: int) -> None:
        _refuse_too_long(np.array([length]), self.preparation, self.place, first=index)
        if total == 0 and not self.preparation.drop_unsupervised:
            raise _nothing_supervised(np.array([index]), None, self.place)
        limit = self.preparation.max_length
        if limit is not None and length > limit and "truncated" not in self.told:
            self.told.add("truncated")
            logger.warning(
                "pronghorn: %s has %d tokens; rows of the %s data are cut to max_length=%d",
                self.place(index), length, self.place.name, limit,
            )  # fmt: skip


def _refuse_too_long(lengths: np.ndarray, preparation: Preparation, place: _Place, first: int = 0) -> None:
    if preparation.max_length is not None or preparation.context is None:
        return
    long = np.flatnonzero(lengths > preparation.context)
    if len(long):
        raise SequenceTooLong(
            f"a row has {int(lengths[long[0]])} tokens and the model takes {preparation.context}",
            where=place(first + int(long[0])) + (f" and {len(long) - 1} more" if len(long) > 1 else ""),
            fix=f"set max_length={preparation.context} to cut such rows, or load the model with a larger "
            "max_seq_length",
        )


def _nothing_supervised(rows: np.ndarray, of: int | None, place: _Place) -> NothingSupervised:
    if len(rows) == 1:
        message = "a row has no token to train on"
    else:
        shown = ", ".join(str(int(row)) for row in rows[:5]) + (", …" if len(rows) > 5 else "")
        message = f"{len(rows)} of {of} rows have no token to train on: rows {shown}"
    return NothingSupervised(
        message,
        where=place(int(rows[0])),
        fix="remove such rows (they may lack an assistant's turn or a completion), or set "
        "drop_unsupervised_rows=True",
    )


def _note_truncation(counts: dict[str, np.ndarray], max_length: int, name: str) -> None:
    """One note on what `max_length` cuts, and on the rows that lose all they teach."""
    cut = int((counts["length"] > max_length).sum())
    lost = int(((counts["kept"] == 0) & (counts["total"] > 0)).sum())
    if cut:
        longest = int(counts["length"].max())
        dropped = f"; {lost} of them lose every token to train on and are left out" if lost else ""
        logger.warning(
            "pronghorn: %d of %d rows of the %s data are cut to max_length=%d (the longest has %d tokens)%s",
            cut, len(counts["length"]), name, max_length, longest, dropped,
        )  # fmt: skip
