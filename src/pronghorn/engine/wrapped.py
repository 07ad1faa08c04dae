"""Models whose decoder stands behind a module of Transformers' that puts images among the embedded tokens.

That module runs as it is: it calls the vision tower, computes positions and calls the decoder. What describes the rows
goes past it, in the attention mask's place, because it would hand it on to the vision tower or make a dense mask of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pronghorn.engine.binding import Binding
from pronghorn.engine.stream import Stream
from pronghorn.kernels.attention import Documents

#: what describes a packed stream (`engine.stream.flatten_rows`)
_STREAM = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "document_lengths")


class RowLayout(dict[str, Any]):
    """What the decoder is told of the rows: `attention_mask`, `token_types` and a packed stream's arguments.

    A dictionary, since such modules take one for masks that are ready and hand it on unread.
    """

    def unpack(self) -> tuple[Any, Tensor | None, dict[str, Any]]:
        """The attention mask, the token types, and the stream's arguments."""
        return self["attention_mask"], self["token_types"], self["stream"]


def past_wrapper(
    binding: Binding,
    attention_mask: Any,
    cache: Any,
    use_cache: bool | None,
    kwargs: dict[str, Any],
    *,
    embedded: bool,
) -> tuple[Any, dict[str, Any]]:
    """The attention mask and the further arguments that the module before the decoder is called with.

    Args:
        embedded: it is called with embeddings, among which images may be.
    """
    if not binding.family.reads_images:
        return attention_mask, kwargs
    stream = {name: kwargs[name] for name in _STREAM if name in kwargs}
    types = None
    if binding.family.image_blocks:
        # Where nothing brings images every token is text, which needs no mask of its own.
        bring = embedded or any(
            kwargs.get(name) is not None for name in ("pixel_values", "mm_encoder_outputs")
        )
        types = kwargs.get("token_type_ids") if bring else None
        if binding.why_stock(binding.decoder, attention_mask, cache, use_cache, kwargs) is not None:
            packed = types is not None and "cu_seq_lens_q" in stream
            return _dense_masks(binding, types, stream) if packed else attention_mask, kwargs
    elif not stream:
        return attention_mask, kwargs
    layout = RowLayout(attention_mask=attention_mask, token_types=types, stream=stream)
    return layout, {name: value for name, value in kwargs.items() if name not in stream}


def with_image_blocks(stream: Stream, token_types: Tensor) -> Stream:
    """The stream with what tokens of an image see: the whole image. `token_types` [B, S]: 1 for its tokens."""
    types = token_types.reshape(-1)
    types = types if stream.kept is None else types.index_select(0, stream.kept)
    return replace(stream, docs=replace(stream.docs, seen_to=_ends_of_images(stream.docs, types)))


def _ends_of_images(docs: Documents, types: Tensor) -> Tensor:
    """`Documents.seen_to` [T]. Neighbouring images of a document count as one, as in Transformers."""
    image, count = types == 1, types.shape[0]
    document = docs.document_of_token(count)
    after = torch.arange(1, count + 1, dtype=torch.int32, device=types.device)
    goes_on = torch.zeros_like(image)
    goes_on[:-1] = image[:-1] & image[1:] & (document[:-1] == document[1:])
    # The first end at or behind each token: the least of all ends that follow it.
    ends = torch.where(goes_on, count, after).flip(0).cummin(0).values.flip(0)
    return torch.where(image, ends, after)


def _dense_masks(binding: Binding, token_types: Tensor, stream: dict[str, Any]) -> dict[str, Tensor]:
    """Masks [1, 1, T, T] by kind of layer for the stock decoder: Transformers' own take places in a packed stream for
    places in its documents, and with them other images."""
    docs = Documents(stream["cu_seq_lens_q"], 0)
    count = token_types.numel()
    document, place = docs.document_of_token(count), torch.arange(count, device=token_types.device)
    seen = place[None] < _ends_of_images(docs, token_types.reshape(-1))[:, None]
    seen &= document[:, None] == document[None]
    near = place[:, None] - place[None] < binding.config.sliding_window
    dtype: torch.dtype = binding.model.get_input_embeddings().weight.dtype
    masks = {"full_attention": seen, "sliding_attention": seen & near}
    hidden = torch.finfo(dtype).min
    return {
        kind: torch.zeros_like(m, dtype=dtype).masked_fill(~m, hidden)[None, None]
        for kind, m in masks.items()
    }


def visual_rows(visual: Tensor, stream: Stream) -> Tensor:
    """Where in a stream the tokens of images are, for a mask [B, S] of the caller's rows; waits for the device."""
    flat = visual.reshape(-1)
    flat = flat if stream.kept is None else flat.index_select(0, stream.kept)
    return flat.nonzero().squeeze(1)
