"""Rows of tokens to one batch: a flat stream of documents without padding, or padded rows where that is all a model
can take. Documents never attend to each other in either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pronghorn.data.budgets import Budgets, row_budget
from pronghorn.data.rows import IGNORED

#: Keys of a batch that are for the trainer, not for the model. `rows`: numbers of its rows in the data as given.
BOOKKEEPING = ("real_tokens", "supervised", "rows")


@dataclass(frozen=True)
class Document:
    """Token ids and labels of one document, both [t]; nothing predicts its first token, whose label is -100."""

    ids: np.ndarray
    labels: np.ndarray


def documents_of(row: Mapping[str, Any]) -> list[Document]:
    """The documents of a row: `seq_lengths` of them where it is packed, else one."""
    ids = np.asarray(row["input_ids"], dtype=np.int64)
    labels = np.array(row.get("labels", row["input_ids"]), dtype=np.int64)
    ends = np.cumsum(row["seq_lengths"]) if row.get("seq_lengths") is not None else [len(ids)]
    if len(labels) != len(ids) or ends[-1] != len(ids):
        raise ValueError(
            f"a row has {len(ids)} input_ids, {len(labels)} labels and documents of {ends[-1]} tokens"
        )
    documents = []
    start = 0
    for end in ends:
        if end > start:
            labels[start] = IGNORED
            documents.append(Document(ids[start:end], labels[start:end]))
        start = end
    return documents


@dataclass
class Collator:
    """Makes the batch that `pronghorn.engine` and Transformers' flash-attention models take (`flat`), or a padded one.

    Flat: input_ids, labels, position_ids int64 [1, T]; cu_seq_lens_q/k int32 [documents + 1]; max_length_q/k int; with
    `for_engine` also loss_rows int64 [n], the positions whose successor is supervised, and document_lengths, so that
    nothing has to be asked of the GPU. Padded: input_ids, labels, attention_mask int64 [documents, longest].

    Args:
        pad_to_multiple_of: round T up with one unsupervised document (flat), or the row length up (padded).
        budgets: round all sizes of a flat batch for the engine up to the few that a captured step is made for.
    """

    pad_token_id: int
    flat: bool = True
    for_engine: bool = True
    pad_to_multiple_of: int | None = None
    budgets: Budgets | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        documents = [document for row in rows for document in documents_of(row)]
        if not documents:
            raise ValueError("a batch without a single token")
        real = sum(len(document.ids) for document in documents)
        batch = self._flat(documents) if self.flat else self._padded(documents)
        numbers = tuple(int(number) for row in rows for number in row.get("rows") or ())
        return {**batch, "real_tokens": real, **({"rows": numbers} if numbers else {})}

    def _flat(self, documents: list[Document]) -> dict[str, Any]:
        documents = documents + [self._filler(length) for length in self._missing(documents)]
        lengths = np.array([len(document.ids) for document in documents], dtype=np.int64)
        total, longest = int(lengths.sum()), int(lengths.max())
        labels = np.concatenate([document.labels for document in documents])
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        loss_rows = np.flatnonzero(labels[1:] != IGNORED).astype(np.int64)
        counted: dict[str, Any] = {"supervised": len(loss_rows)} if self.for_engine else {}
        if self.for_engine and self.budgets is not None:
            lengths = _fill(lengths, self.budgets.documents(len(lengths)), 0)
            longest = self.budgets.longest(longest, total)
            # The last position predicts nothing: a row of the loss without a label.
            loss_rows = _fill(loss_rows, row_budget(len(loss_rows), total), total - 1)
        bounds = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32))
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(np.concatenate([document.ids for document in documents]))[None],
            "labels": torch.from_numpy(labels)[None],
            "position_ids": torch.from_numpy(np.arange(total, dtype=np.int64) - starts)[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds.clone(),
            "max_length_q": longest,
            "max_length_k": longest,
            **counted,
        }
        if self.for_engine:
            batch["loss_rows"] = torch.from_numpy(loss_rows)
            batch["document_lengths"] = tuple(int(length) for length in lengths)
        return batch

    def _missing(self, documents: list[Document]) -> list[int]:
        """Lengths of the unsupervised documents that round a batch up."""
        total = sum(len(document.ids) for document in documents)
        missing = -total % self.pad_to_multiple_of if self.pad_to_multiple_of else 0
        lengths = [missing] if missing else []
        if self.for_engine and self.budgets is not None:
            lengths += self.budgets.padding(total + missing, max(len(document.ids) for document in documents))
        return lengths

    def _filler(self, length: int) -> Document:
        ids = np.full(length, self.pad_token_id, dtype=np.int64)
        return Document(ids, np.full(length, IGNORED, dtype=np.int64))

    def _padded(self, documents: list[Document]) -> dict[str, Any]:
        longest = max(len(document.ids) for document in documents)
        if self.pad_to_multiple_of:
            longest += -longest % self.pad_to_multiple_of
        shape = (len(documents), longest)
        ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for index, document in enumerate(documents):
            length = len(document.ids)
            ids[index, :length], labels[index, :length], mask[index, :length] = (
                document.ids,
                document.labels,
                1,
            )
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "attention_mask": torch.from_numpy(mask),
        }


def _fill(values: np.ndarray, count: int, value: int) -> np.ndarray:
    """`values` with copies of `value` behind them, `count` in all."""
    return np.concatenate([values, np.full(max(count - len(values), 0), value, dtype=values.dtype)])
