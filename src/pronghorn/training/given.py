"""Data sets and collators as they were given to the trainer: made usable, or refused with the reason."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import Any

import trl
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from pronghorn.data.images import has_images
from pronghorn.errors import DatasetUnusable, RowInvalid

logger = logging.getLogger("pronghorn")


def training_rows(rows: Any) -> Any:
    """Like `as_dataset`, for the one data set to train on.

    Raises:
        DatasetUnusable: none; several data sets, such as all splits of one; and whatever `as_dataset` raises.
    """
    if rows is None:
        raise DatasetUnusable(
            "there is nothing to train on", fix="give rows: SFTTrainer(..., train_dataset=rows)"
        )
    if isinstance(rows, dict):
        names = [str(name) for name in rows]
        raise DatasetUnusable(
            f"train_dataset holds several data sets: {', '.join(names)}",
            fix=f"give one of them: train_dataset=data[{names[0] if names else 'train'!r}]",
        )
    return as_dataset(rows)


def as_dataset(rows: Any) -> Any:
    """A list of rows as a Dataset, also among several data sets by name; anything else as it is.

    Raises:
        DatasetUnusable: there are no rows, or the name of a data set instead of the data set.
        RowInvalid: a list of something else than rows.
    """
    if isinstance(rows, str | os.PathLike):
        raise DatasetUnusable(
            f"a data set is expected, not the name '{rows}'",
            fix='load it: datasets.load_dataset("json", data_files=...)["train"]',
        )
    if type(rows) is dict:
        return {name: as_dataset(part) for name, part in rows.items()}
    if isinstance(rows, list):
        rows = _from_list(rows)
    if isinstance(rows, Dataset) and not len(rows):
        raise DatasetUnusable("the data has no rows", fix="check the data set and its split")
    return rows


def _from_list(rows: list[Any]) -> Dataset:
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise RowInvalid(
                f"a row is {type(row).__name__}, not a dictionary",
                where=f"row {index}",
                fix='give rows such as {"text": ...}',
            )
    return _held(rows) if any(map(has_images, rows)) else Dataset.from_list(rows)


def _held(rows: list[dict[str, Any]]) -> Dataset:
    """Rows that stay the objects they are: a table would keep a copy of each image, and has no type for some parts."""
    numbers = Dataset.from_dict({"row": list(range(len(rows)))})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return numbers.with_transform(partial(_rows_of, rows, columns))


def _rows_of(
    rows: list[dict[str, Any]], columns: list[str], batch: dict[str, list[int]]
) -> dict[str, list[Any]]:
    return {name: [rows[number].get(name) for number in batch["row"]] for name in columns}


def usable_collator(collator: Any, packing: bool) -> Any:
    """The user's collator, unless ours does what it does: padding rows for the model."""
    if collator is None:
        return None
    if type(collator) in (DataCollatorForSeq2Seq, trl.trainer.sft_trainer.DataCollatorForLanguageModeling):
        logger.warning("pronghorn: %s only pads; batches are made without padding", type(collator).__name__)
        return None
    if packing:
        raise DatasetUnusable(
            "packing puts several documents into a row, which a collator of your own does not keep apart",
            fix="leave out data_collator, or packing",
        )
    return collator
