"""Rows of tokens as one flat stream with document boundaries, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels.attention import Documents


@dataclass(frozen=True)
class Stream:
    """One flat [T] token stream and how it maps to the caller's [B, S] rows.

    `position_ids` is [T], or [3, T] where tokens have a time, a height and a width. `kept` holds the flat positions of
    real tokens where padding was taken out, else None.
    """

    docs: Documents
    position_ids: Tensor
    batch: int
    length: int
    kept: Tensor | None = None


def flatten_rows(
    embeddings: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Stream]:
    """Embeddings [B, S, H] -> [T, H] and the stream's description.

    Four callers: a packed stream (`cu_seq_lens_q` in kwargs, B = 1); rows without padding (T = B·S); rows with position
    ids, which may hold packed documents as in Transformers; and rows with a padding mask [B, S], whose padding is
    removed. The last two wait for the device.
    """
    batch, length, hidden = embeddings.shape
    flat = embeddings.reshape(batch * length, hidden)
    places = _places(position_ids)
    if position_ids is None:
        position_ids = torch.arange(length, device=flat.device).expand(batch, length)
    positions = _flat_positions(position_ids, batch, length)
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        longest = kwargs.get("max_length_q")
        longest = int(cu_seqlens.diff().max()) if longest is None else int(longest)
        lengths = kwargs.get("document_lengths")
        if lengths is not None and sum(lengths) != batch * length:
            raise ValueError(f"documents of {sum(lengths)} tokens in a stream of {batch * length}")
        docs = Documents(cu_seqlens, longest, lengths)
        return flat, Stream(docs, positions, batch, length)
    if attention_mask is None and places is not None:
        docs = _documents_by_position(places.expand(batch, length))
        return flat, Stream(docs, positions, batch, length)
    if attention_mask is None:
        cu_seqlens = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=flat.device)
        return flat, Stream(Documents(cu_seqlens, length, (length,) * batch), positions, batch, length)
    mask = attention_mask.to(torch.bool)
    kept = mask.reshape(-1).nonzero().squeeze(1)
    lengths = tuple(mask.sum(1).tolist())
    cu_seqlens = torch.tensor((0, *lengths), dtype=torch.int32, device=flat.device).cumsum(
        0, dtype=torch.int32
    )
    docs = Documents(cu_seqlens, max(lengths), lengths)
    return flat.index_select(0, kept), Stream(docs, positions.index_select(-1, kept), batch, length, kept)


def _places(position_ids: Tensor | None) -> Tensor | None:
    """Positions by which documents can be told apart [B or 1, S]; a time, a height and a width say nothing of them."""
    if position_ids is None or position_ids.dim() == 2:
        return position_ids
    return position_ids[0] if position_ids.shape[0] == 4 else None


def _flat_positions(position_ids: Tensor, batch: int, length: int) -> Tensor:
    """[B or 1, S] -> [T]; [3 or 4, B, S] -> [3, T]: of four the first is the place in the row."""
    if position_ids.dim() == 2:
        return position_ids.expand(batch, length).reshape(-1)
    return position_ids[-3:].expand(3, batch, length).reshape(3, -1)


def _documents_by_position(position_ids: Tensor) -> Documents:
    """Documents of rows [B, S]: one begins with each row, and wherever a position is not the one before plus 1."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    starts = begins.reshape(-1).nonzero().squeeze(1)
    bounds = torch.nn.functional.pad(starts, (0, 1), value=position_ids.numel())
    lengths = tuple(bounds.diff().tolist())
    return Documents(bounds.to(torch.int32), max(lengths), lengths)


def unflatten_rows(hidden_states: Tensor, stream: Stream) -> Tensor:
    """[T, H] -> [B, S, H]; positions that were padding are zero."""
    width = hidden_states.shape[-1]
    if stream.kept is not None:
        rows = hidden_states.new_zeros(stream.batch * stream.length, width)
        hidden_states = rows.index_copy(0, stream.kept, hidden_states)
    return hidden_states.view(stream.batch, stream.length, width)
