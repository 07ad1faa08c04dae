"""Batches with images in two parts: a vision tower, run as it is, and a decoder on embeddings of a static shape.

    e = wrapper(tokens, images)       eagerly: the tower's shapes are those of the images
    loss(decoder(e))                  recorded: [T, H] like any stream

What the decoder would be called with is taken where the wrapper calls it. Where the tower or the embeddings are
trained, the recorded part leaves dloss/de, from which autograd goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from pronghorn.blocks.levels import space_of
from pronghorn.engine.binding import Binding
from pronghorn.engine.forward import readable_head
from pronghorn.engine.loss import summed_loss, supervised_rows
from pronghorn.engine.wrapped import RowLayout, past_wrapper

#: a stream's description, which the decoder is told past the wrapper
_LAYOUT = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
#: what the loss reads
_LOSS = ("labels", "loss_rows")
_DEEPSTACK = "deepstack_{}"


def embedded(binding: Binding, stream: Mapping[str, Tensor], images: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the decoder and the loss read of a batch with images, all of a size that the stream's sizes give.

    `inputs_embeds` [1, T, H], `position_ids`, the documents' bounds, labels and rows of the loss; `token_types` [1, T]
    where tokens of an image see one another; `visual_rows` [V] and `deepstack_i` [V, H] where a tower's earlier layers
    are added to the decoder's first ones: V rounded up to a quarter of T with rows of zeros.
    """
    described = {name: stream[name] for name in _LAYOUT if name in stream} | dict(images)
    layout, described = past_wrapper(binding, None, None, False, described, embedded=False)
    with _taken(binding.decoder) as taken:
        binding.model.model(
            input_ids=stream["input_ids"],
            attention_mask=layout,
            position_ids=stream["position_ids"],
            use_cache=False,
            return_dict=True,
            **described,
        )
    found = {name: stream[name] for name in (*_LAYOUT, *_LOSS) if name in stream}
    found |= {"inputs_embeds": taken["inputs_embeds"], "position_ids": taken["position_ids"]}
    types = taken["attention_mask"]["token_types"] if binding.family.image_blocks else None
    if types is not None:
        found["token_types"] = types
    return found | _deepstack(taken, found["labels"].shape[-1])


def _deepstack(taken: Mapping[str, Any], tokens: int) -> dict[str, Tensor]:
    added = taken.get("deepstack_visual_embeds") or ()
    if not added:
        return {}
    rows = taken["visual_pos_masks"].reshape(-1).nonzero().squeeze(1)
    missing = _visual_budget(rows.numel(), tokens) - rows.numel()
    found = {"visual_rows": torch.nn.functional.pad(rows, (0, missing), value=tokens - 1)}
    for index, rows_added in enumerate(added):
        found[_DEEPSTACK.format(index)] = torch.nn.functional.pad(rows_added, (0, 0, 0, missing))
    return found


def _visual_budget(count: int, tokens: int) -> int:
    step = max(tokens // 4, 1)
    return -(-count // step) * step


def loss_of_embedded(binding: Binding, batch: Mapping[str, Any], normalizer: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and number of right predictions of what `embedded` made."""
    layout = RowLayout(
        attention_mask=None,
        token_types=batch.get("token_types"),
        stream={name: batch[name] for name in _LAYOUT},
    )
    visual = {}
    if "visual_rows" in batch:
        added = [batch[name] for name in sorted(batch) if name.startswith(_DEEPSTACK.format(""))]
        visual = {"visual_rows": batch["visual_rows"], "deepstack_visual_embeds": added}
    output = binding.decoder(
        inputs_embeds=batch["inputs_embeds"],
        attention_mask=layout,
        position_ids=batch["position_ids"],
        use_cache=False,
        **visual,
    )
    head = readable_head(binding.model, binding)
    assert head is not None
    space = space_of(binding.save_levels, binding.tile_rows)
    labels, rows = (batch[name] for name in _LOSS)
    taken, targets = supervised_rows(output.last_hidden_state, labels, rows)
    del output
    return summed_loss(head, taken, targets, normalizer, space, binding.scales)


def embedded_nonsense(binding: Binding, stream: Mapping[str, Any]) -> dict[str, Any]:
    """What `embedded` would make of a stream of this size if half of it were images."""
    embedding = binding.model.get_input_embeddings().weight
    tokens, device = stream["input_ids"].shape[-1], embedding.device
    found = {name: stream[name] for name in (*_LAYOUT, *_LOSS)}
    found["inputs_embeds"] = torch.zeros(1, tokens, embedding.shape[1], dtype=embedding.dtype, device=device)
    found["position_ids"] = stream["position_ids"]
    if hasattr(binding.model.model, "get_rope_index"):  # the place, then a time, a height and a width
        found["position_ids"] = stream["position_ids"].expand(4, 1, tokens).clone()
    if binding.family.image_blocks:
        found["token_types"] = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    layers = getattr(binding.model.config.vision_config, "deepstack_visual_indexes", None) or ()
    if layers:
        rows = _visual_budget(tokens // 2, tokens)
        found["visual_rows"] = torch.full((rows,), tokens - 1, device=device)
        for index in range(len(layers)):
            name = _DEEPSTACK.format(index)
            found[name] = torch.zeros(rows, embedding.shape[1], dtype=embedding.dtype, device=device)
    return found


@contextmanager
def _taken(decoder: Any) -> Iterator[dict[str, Any]]:
    """What the decoder is called with meanwhile, by name; it runs nothing and hands its embeddings on."""
    found: dict[str, Any] = {}

    def take(**given: Any) -> BaseModelOutputWithPast:
        found.update(given)
        return BaseModelOutputWithPast(last_hidden_state=given["inputs_embeds"])

    # Under accelerate's hooks, as `bind` does it.
    name = "_old_forward" if "_old_forward" in decoder.__dict__ else "forward"
    bound = decoder.__dict__[name]
    setattr(decoder, name, take)
    try:
        yield found
    finally:
        setattr(decoder, name, bound)
