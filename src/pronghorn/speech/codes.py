"""Arrays of codes out of rows: lists of numbers, or .npy files beside the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pronghorn.errors import SpeechRowInvalid


def read_codes(
    value: Any, books: int, size: int, folder: Path | None = None, first_size: int | None = None
) -> np.ndarray:
    """int64 [books, frames] from nested lists, an array, or the path of a .npy file.

    Args:
        size: codes of every codebook are below it; `first_size`: those of the first one, where it is smaller.
        folder: what a relative path starts from.

    Raises:
        SpeechRowInvalid: there is no such file, or no whole numbers of that shape in that range in it.
    """
    array = _read_file(value, folder) if isinstance(value, str) else _as_array(value)
    if array.ndim != 2 or array.shape[1] == 0:
        shape = "an empty array" if array.size == 0 else f"an array of shape {list(array.shape)}"
        raise SpeechRowInvalid(f"the codes are {shape}", fix=f"give [{books} codebooks, frames]")
    if array.shape[0] != books:
        turned = array.shape[1] == books
        raise SpeechRowInvalid(
            f"the codes have {array.shape[0]} codebooks, the model has {books}",
            fix="frames come second: transpose them" if turned else "encode with the codec of this model",
        )
    for book, row in enumerate(array):
        limit = first_size if first_size is not None and book == 0 else size
        wrong = np.flatnonzero((row < 0) | (row >= limit))
        if wrong.size:
            raise SpeechRowInvalid(
                f"code {int(row[wrong[0]])} of codebook {book}, frame {int(wrong[0])}, is outside of 0 to {limit - 1}",
                fix="encode with the codec of this model",
            )
    return array


def _read_file(name: str, folder: Path | None) -> np.ndarray:
    path = Path(name).expanduser()
    path = path if path.is_absolute() or folder is None else folder / path
    if path.suffix != ".npy":
        raise SpeechRowInvalid(f"'{name}' is no .npy file", fix="save codes with numpy.save")
    try:
        return _as_array(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        reason = (
            "there is no such file" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
        )
        raise SpeechRowInvalid(
            f"'{name}' cannot be read: {reason}", fix="check the path; save with numpy.save"
        ) from None


def _as_array(value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError:  # rows of different lengths
        raise SpeechRowInvalid(
            "the codebooks have different numbers of frames", fix="give one code each a frame"
        ) from None
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise SpeechRowInvalid(f"the codes are {array.dtype}, no whole numbers", fix="give integers")
    return array.astype(np.int64)
