"""A batch in two, for a step that ran out of memory: the parts' losses over the whole batch's normaliser add up to its
loss, and so do their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pronghorn.data.rows import IGNORED

Batch = dict[str, Any]

#: Keys [1, T] of a flat batch.
_STREAM = ("input_ids", "labels", "position_ids")


def split_batch(batch: Mapping[str, Any]) -> tuple[Batch, Batch] | None:
    """Two batches of about half the tokens each; None for a single document or images, which cannot be split.

    A flat batch (with `cu_seq_lens_q`) is cut between documents, a padded one between rows. Tensors keep their device.
    Values that count over the whole batch, such as `num_items_in_batch`, are handed to both parts unchanged.
    """
    if any(name.startswith("pixel_values") for name in batch):
        return None
    return _split_flat(batch) if "cu_seq_lens_q" in batch else _split_rows(batch)


def _split_flat(batch: Mapping[str, Any]) -> tuple[Batch, Batch] | None:
    lengths = batch.get("document_lengths")
    if lengths is None:
        lengths = batch["cu_seq_lens_q"].diff().tolist()
    lengths = [int(length) for length in lengths if length > 0]
    if len(lengths) < 2:
        return None
    total = sum(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    cut = min(range(1, len(lengths)), key=lambda i: max(starts[i], total - starts[i]))
    first = _part(batch, lengths[:cut], 0)
    second = _part(batch, lengths[cut:], starts[cut])
    if "real_tokens" in batch:  # padding stands last
        first["real_tokens"] = min(int(batch["real_tokens"]), starts[cut])
        second["real_tokens"] = int(batch["real_tokens"]) - first["real_tokens"]
    return first, second


def _part(batch: Mapping[str, Any], lengths: list[int], start: int) -> Batch:
    """The documents of these lengths, which begin at token `start`, as a flat batch."""
    end, whole = start + sum(lengths), batch["input_ids"].shape[-1]
    part: Batch = {}
    for name, value in batch.items():
        along = isinstance(value, Tensor) and (name in _STREAM or value.shape[-1:] == (whole,))
        part[name] = value[..., start:end] if along else value
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(batch["cu_seq_lens_q"])
    longest = max(lengths)
    part |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds.clone()}
    part |= {"max_length_q": longest, "max_length_k": longest}
    if "document_lengths" in batch:
        part["document_lengths"] = tuple(lengths)
    if "loss_rows" in batch:
        rows = (part["labels"][0, 1:] != IGNORED).nonzero().squeeze(1)
        part["loss_rows"] = rows.to(batch["loss_rows"])
        if "supervised" in batch:
            part["supervised"] = len(rows)
    return part


def _split_rows(batch: Mapping[str, Any]) -> tuple[Batch, Batch] | None:
    count = batch["input_ids"].shape[0]
    if count < 2:
        return None
    parts: list[Batch] = []
    for at in (slice(0, count // 2), slice(count // 2, count)):
        rows = {
            n: v[at] if isinstance(v, Tensor) and v.shape[:1] == (count,) else v for n, v in batch.items()
        }
        if "real_tokens" in batch and "attention_mask" in batch:
            rows["real_tokens"] = int(rows["attention_mask"].sum())
        parts.append(rows)
    return parts[0], parts[1]
