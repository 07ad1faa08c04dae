"""Rows that a model reads while its layers are measured."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pronghorn.data.reading import RowFile, readable_rows
from pronghorn.data.rows import RowFormat, RowRenderer
from pronghorn.errors import CalibrationMissing, PronghornError
from pronghorn.quantising.settings import DOCSTRINGS

#: Tokens of a row. Longer ones change moments little and cost attention.
ROW_TOKENS = 512
#: Tokens beyond those that are measured on, on which the quantised model is compared with the original.
HELD_OUT_TOKENS = 2048


@dataclass(frozen=True)
class CalibrationRows:
    """Token ids of rows without padding: [R, S] to measure on, and [R', S] that are kept from that, to judge by.

    `held_out` is None where the data has no more.
    """

    ids: Tensor
    held_out: Tensor | None = None


def calibration_rows(data: Any, tokenizer: Any, tokens: int) -> CalibrationRows:
    """Rows of at most `ROW_TOKENS`, `tokens` in all and some more held out, as the model would be trained on them.

    Args:
        data: texts, rows of any form that training takes, a file of them, or "docstrings" for those of Python's own
            library, which are on every machine.

    Raises:
        CalibrationMissing: for rows that hold no tokens.
        PronghornError: for a file or rows that cannot be read.
    """
    if tokenizer is None:
        raise CalibrationMissing("there is no tokenizer to read calibration rows with", fix="give one")
    form = RowFormat()
    render, found, row = RowRenderer(tokenizer, form), list[int](), 0
    for row, (value, where) in enumerate(_rows(data), start=1):
        given = {form.text_field: value} if isinstance(value, str) else value
        try:
            found += render(given)["input_ids"]
        except PronghornError as error:
            error.where = error.where or where or f"row {row} of the calibration data"
            raise
        if len(found) >= tokens + HELD_OUT_TOKENS:
            break
    length = min(ROW_TOKENS, len(found))
    if length < 2:
        raise CalibrationMissing(
            "the calibration data holds no text" if row else "the calibration data has no rows",
            fix="give rows like those that the model will be trained on; 8,192 tokens are enough",
        )
    rows = torch.tensor(found[: len(found) // length * length]).view(-1, length)
    measured = max(1, tokens // length)
    held_out = rows[measured : measured + HELD_OUT_TOKENS // length]
    return CalibrationRows(rows[:measured], held_out if len(held_out) else None)


def _rows(data: Any) -> Iterator[tuple[Any, str]]:
    """Texts and rows, each with where it stands in a file, else nothing."""
    if isinstance(data, str | os.PathLike) and str(data) != DOCSTRINGS:
        yield from readable_rows(RowFile(Path(data).expanduser()))
    elif isinstance(data, Iterable) and not isinstance(data, Mapping):
        yield from ((row, "") for row in (_of_docstrings() if isinstance(data, str) else data))
    else:
        raise CalibrationMissing(
            f"calibration={data!r} holds no rows", fix="give a list of texts or rows, a data set or a file"
        )


def _of_docstrings() -> Iterator[dict[str, Any]]:
    from pronghorn.data.docstrings import docstring_rows

    rows = docstring_rows()
    random.Random(0).shuffle(rows)  # by name they are sorted, and the first ones alike
    for row in rows:
        yield {"messages": row.messages()}
