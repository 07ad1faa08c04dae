"""Rows that are tokens already: which of them count, and whether the model knows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pronghorn.errors import RowInvalid

IGNORED = -100
#: Tokens are kept in 32 bits.
_LARGEST = 2**31 - 1


def token_row(row: Mapping[str, Any], completion_only: bool | None = None) -> dict[str, list[int]]:
    """Tokens and labels: `labels` as given, else from assistant_masks and (completion-only) completion_mask.

    Positions with attention_mask 0 are padding and go: batches are made without any.

    Raises:
        RowInvalid: columns of different lengths, or something else than numbers in them.
    """
    ids = _integers(row, "input_ids")
    if ids and min(ids) < 0:
        raise RowInvalid(f"input_ids holds {min(ids)}, and tokens are counted from 0")
    columns = {"input_ids": ids}
    if row.get("labels") is not None:
        columns["labels"] = _integers(row, "labels")
    else:
        masks = ["assistant_masks"] + (["completion_mask"] if completion_only is not False else [])
        kept = [_integers(row, name, len(ids)) for name in masks if row.get(name) is not None]
        columns["labels"] = labels_where(
            ids, [all(bits) for bits in zip(*kept, strict=True)] if kept else None
        )
    if len(columns["labels"]) != len(ids):
        raise RowInvalid(f"the row has {len(ids)} input_ids and {len(columns['labels'])} labels")
    if row.get("attention_mask") is None:
        return columns
    real = _integers(row, "attention_mask", len(ids))
    return {name: [t for t, bit in zip(column, real, strict=True) if bit] for name, column in columns.items()}


def labels_where(ids: list[int], kept: list[bool] | None) -> list[int]:
    """The tokens as labels, -100 where they are not kept; None keeps all."""
    return list(ids) if kept is None else [t if k else IGNORED for t, k in zip(ids, kept, strict=True)]


def check_known(rendered: Mapping[str, list[int]], vocabulary: int | None, tokenizer: Any) -> None:
    """Refuse tokens outside the vocabulary: a GPU ends the process at one, without naming the row.

    Raises:
        RowInvalid: with the token.
    """
    for column in ("input_ids", "labels"):
        ids = [t for t in rendered[column] if t != IGNORED] if column == "labels" else rendered[column]
        if not ids or (min(ids) >= 0 and (vocabulary is None or max(ids) < vocabulary)):
            continue
        wrong = min(ids) if min(ids) < 0 else max(ids)
        shown = f" ({tokenizer.decode([wrong])!r})" if 0 <= wrong < len(tokenizer) else ""
        known = f" and the model has tokens 0 to {vocabulary - 1}" if vocabulary else ""
        raise RowInvalid(
            f"{column} holds {wrong}{shown}{known}",
            fix="use the tokenizer that belongs to the model, or model.resize_token_embeddings(len(tokenizer)) "
            "before the adapter is added",
        )


def _integers(row: Mapping[str, Any], column: str, length: int | None = None) -> list[int]:
    values = row[column]
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or any(type(v) not in (int, bool) for v in values):
        raise RowInvalid(
            f"'{column}' is no list of whole numbers", fix="give one row's tokens as a flat list"
        )
    if values and max(values) > _LARGEST:
        raise RowInvalid(f"'{column}' holds {max(values)}, which no vocabulary has")
    if length is not None and len(values) != length:
        raise RowInvalid(f"the row's '{column}' has {len(values)} values and its input_ids {length}")
    return list(values)
