"""From tokens to vectors: batches without padding where the fast path runs, a forward, pooling over real tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pronghorn.data.budgets import Budgets
from pronghorn.data.collator import Collator
from pronghorn.embedding.layout import Pooling
from pronghorn.engine import base_causal_lm, binding_of, evaluating

#: What the model itself is called with; the collator's other keys are for training on next tokens.
_MODEL_KEYS = (
    "input_ids", "position_ids", "attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    "document_lengths",
)  # fmt: skip


class Batcher:
    """Makes batches of texts for a model: one flat stream for a bound one, else rows padded on the right.

    A batch has `inputs`, what the model is called with; `lengths` int64 [n], the tokens of each text; and `kept` int64
    [T], where the texts' tokens lie in the rows one after another (None where nothing else does). `filled`: the last
    length is that of what fills the stream up.

    Args:
        budgets: round all sizes of a stream up for steps of static shape.
    """

    def __init__(self, model: Any, pad_token_id: int | None, budgets: Budgets | None = None) -> None:
        binding = binding_of(model)
        self.flat = binding is not None and binding.bound
        self._filled = self.flat and budgets is not None
        self._collate = Collator(pad_token_id or 0, flat=self.flat, for_engine=self.flat, budgets=budgets)

    def __call__(self, texts: Sequence[np.ndarray]) -> dict[str, Any]:
        batch = self._collate([{"input_ids": ids} for ids in texts])
        lengths = [len(ids) for ids in texts]
        if self._filled:
            lengths.append(batch["input_ids"].numel() - sum(lengths))
        inputs = {name: batch[name] for name in _MODEL_KEYS if name in batch}
        kept = None if self.flat else batch["attention_mask"].reshape(-1).nonzero().squeeze(1)
        return {"inputs": inputs, "lengths": torch.tensor(lengths), "kept": kept, "filled": self._filled}


def pool(hidden_states: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
    """One vector for each text of a flat stream.

        mean  v_i = 1/t_i Σ h_t over the tokens of text i          cls  v_i = h of its first          last  of its last

    Args:
        hidden_states: [T, H], texts one after another. lengths: int64 [n], their sum is T.

    Returns:
        [n, H] in fp32, or fp64 for an fp64 stream.
    """
    ends = lengths.cumsum(0)
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    if pooling == "last":
        return hidden_states.index_select(0, ends - 1).to(wide)
    if pooling == "cls":
        # Of a text without tokens, which fills nothing up, any will do.
        firsts = (ends - lengths).clamp(max=hidden_states.shape[0] - 1)
        return hidden_states.index_select(0, firsts).to(wide)
    # unsafe: the lengths are the collator's, and checking them would wait for the device.
    return torch.segment_reduce(hidden_states.to(wide), "mean", lengths=lengths, axis=0, unsafe=True)


def forward(model: Any, batch: Mapping[str, Any], pooling: Pooling) -> Tensor:
    """Vectors [n, H] of a batch that `Batcher` made and that lies on the model's device; not normalised."""
    inputs = dict(batch["inputs"])
    if "cu_seq_lens_q" in inputs:
        inputs["use_cache"] = False
    hidden = model(**inputs).last_hidden_state
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if batch["kept"] is not None:
        hidden = hidden.index_select(0, batch["kept"])
    vectors = pool(hidden, batch["lengths"], pooling)
    return vectors[:-1] if batch["filled"] else vectors


@torch.no_grad()
def encode_tokens(
    model: Any,
    texts: Sequence[np.ndarray],
    batcher: Batcher,
    pooling: Pooling,
    batch_tokens: int,
    place: torch.device | None = None,
) -> Tensor:
    """Vectors [n, H] of texts in their order, not normalised. Texts of like lengths share a batch of at most
    `batch_tokens` positions; the model's mode stays as it was.

    Args:
        place: the device that vectors are gathered on; None: the model's.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    with evaluating(model):
        parts = [
            forward(model, to_device(batcher([texts[i] for i in part]), device), pooling).to(place or device)
            for part in _parts(order, texts, batch_tokens)
        ]
    vectors = torch.cat(parts)
    return torch.empty_like(vectors).index_copy_(0, torch.tensor(order, device=vectors.device), vectors)


def shortened(vectors: Tensor, dim: int | None, unit: bool) -> Tensor:
    """The first `dim` elements (None: all), of length one where asked for."""
    vectors = vectors if dim is None else vectors[..., :dim]
    return normalize(vectors, dim=-1) if unit else vectors


def width_of(model: Any) -> int:
    """Elements of a token vector."""
    return int(base_causal_lm(model).config.hidden_size)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with all its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    return batch


def _parts(order: Sequence[int], texts: Sequence[np.ndarray], batch_tokens: int) -> Iterator[list[int]]:
    """Texts from the longest on in parts: their number times the longest's length stays within `batch_tokens`."""
    part: list[int] = []
    for index in order:
        if part and (len(part) + 1) * len(texts[part[0]]) > batch_tokens:
            yield part
            part = []
        part.append(index)
    if part:
        yield part
