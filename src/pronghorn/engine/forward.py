"""The forwards that `bind` puts on a model: causal LM, decoder and decoder layer.

They are module-level functions bound with `functools.partial`, which survives pickle and deepcopy. Each falls back
to the stock forward when a call asks for something it does not give (a KV cache, hidden states of every layer, …).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.utils.generic import can_return_tuple

from pronghorn.blocks import (
    AttentionBlock,
    AttentionPart,
    DecoderLayer,
    GluBlock,
    Level,
    LinearProjection,
    MlpBlock,
    Norm,
    PackedAdapters,
    ProjectionGroup,
    SplitGroup,
)
from pronghorn.blocks.glu import TILE_ROWS
from pronghorn.blocks.levels import space_of
from pronghorn.blocks.projection import Projection
from pronghorn.engine.binding import Binding
from pronghorn.engine.delta import delta_net_block
from pronghorn.engine.latent import latent_attention_block
from pronghorn.engine.layer_call import LayerCall, ReadGroups
from pronghorn.engine.loss import scaled_logits, summed_loss, supervised_rows, without_padding
from pronghorn.engine.mixture import BALANCE, balance_of, moe_block, with_balance
from pronghorn.engine.read import (
    SEEDS_OF_LAYER,
    Reading,
    active_module,
    dropout_seed,
    read_norm,
    read_norm_before,
    read_projection,
)
from pronghorn.engine.signature import has_hooks
from pronghorn.engine.stream import Stream, flatten_rows, unflatten_rows
from pronghorn.engine.wrapped import RowLayout, past_wrapper, visual_rows, with_image_blocks
from pronghorn.families import MOE
from pronghorn.kernels.attention import AttentionCall

logger = logging.getLogger("pronghorn")


@dataclass
class LossOutput(CausalLMOutputWithPast):
    """Transformers' output with the number of supervised tokens whose most likely prediction was right; `aux_loss` is
    the balance of experts, where it was asked for."""

    num_correct: Tensor | None = None
    aux_loss: Tensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """What Transformers' output has, in its order."""
        return tuple(value for name, value in self.items() if name != "num_correct")


# --- decoder layer ---------------------------------------------------------------------------------------------


def layer_forward(
    layer: Any, hidden_states: Tensor, *args: Any, pronghorn: LayerCall | None = None, **kwargs: Any
) -> Any:
    """A decoder layer: the blocks when the bound decoder calls it, the stock forward otherwise."""
    if pronghorn is None:
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    return build_layer(layer, pronghorn)(hidden_states)


def build_layer(layer: Any, call: LayerCall) -> DecoderLayer:
    """Read a layer's modules and make it ready to run."""
    binding, index = call.binding, call.binding.layer_index(layer)
    reading = Reading(layer.training, call.seed + SEEDS_OF_LAYER * index)
    read = {
        slot: (found, None if call.packed is None else call.packed.group((index, slot), found))
        for slot, found in binding.groups(layer, reading).items()
    }
    asked_for_checkpointing = bool(getattr(layer, "gradient_checkpointing", False)) and layer.training
    level: Level = "none" if asked_for_checkpointing else binding.save_level(index)
    mlp = MLP_BLOCKS[binding.mlp_of(layer)](layer, call, read)
    parts = binding.family.parts.of(layer)
    attention: Callable[[Any, LayerCall, ReadGroups], AttentionPart] = _attention_block
    if parts.latent is not None:
        attention = latent_attention_block
    elif parts.delta is not None:
        attention = delta_net_block
    block = attention(layer, call, read)
    return DecoderLayer.build(block, mlp, level, call.dtype, call.stash, not has_hooks(layer))


def _attention_block(layer: Any, call: LayerCall, read: ReadGroups) -> AttentionBlock:
    binding, parts = call.binding, call.binding.family.parts
    attention, offset = getattr(layer, parts.attention), binding.family.norm_offset
    config, index, scales = binding.config, binding.layer_index(layer), binding.scales
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    cos, sin = call.angles[binding.family.rotation(config, index)]
    window = binding.family.window(config, index)
    backend = binding.attention_backend(
        cos.device,
        call.dtype,
        head_dim,
        window=window is not None,
        both_ways=call.stream.docs.seen_to is not None,
    )
    widths = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    return AttentionBlock(
        norm=read_norm_before(layer, parts.input_norm, offset),
        qkv=_group(read[0], None if parts.qkv is None else widths),
        o=_group(read[3]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        cos=cos,
        sin=sin,
        docs=call.stream.docs,
        call=AttentionCall(
            float(attention.scaling),
            window,
            backend,
            scales.attention_softcap,
            None if parts.sinks is None else attention._parameters[parts.sinks],
        ),
        q_norm=_read_part_norm(attention, parts.q_norm, offset),
        k_norm=_read_part_norm(attention, parts.k_norm, offset),
        pairs=binding.family.turns == "pairs",
        query_scale=call.query_scale,
        gated=parts.gated,
        output_norm=_read_part_norm(layer, parts.attention_output_norm, offset),
        output_scale=scales.residual,
    )


def _glu_block(layer: Any, call: LayerCall, read: ReadGroups) -> GluBlock:
    binding, parts = call.binding, call.binding.family.parts
    widths = (binding.config.intermediate_size,) * 2
    return GluBlock(
        norm=read_norm_before(layer, parts.mlp_norm or parts.input_norm, binding.family.norm_offset),
        gate_up=_group(read[4], None if parts.gate_up is None else widths),
        down=_group(read[6]),
        activation=binding.activation,
        tile_rows=binding.tile_rows or TILE_ROWS,
        output_norm=_read_part_norm(layer, parts.mlp_output_norm, binding.family.norm_offset),
        output_scale=binding.scales.residual,
        beside_attention=parts.side_by_side,
    )


#: `DecoderFamily.mlp` -> what makes that kind of block of a layer
MLP_BLOCKS: dict[str, Callable[[Any, LayerCall, ReadGroups], MlpBlock]] = {"glu": _glu_block, MOE: moe_block}


def _group(
    read: tuple[list[Projection], PackedAdapters | None], widths: tuple[int, ...] | None = None
) -> ProjectionGroup:
    """Projections of one input; or, with `widths`, the one module that gives all of them."""
    found, packed = read
    return ProjectionGroup(found, packed) if widths is None else SplitGroup(found[0], widths, packed)


def _read_part_norm(parent: Any, name: str | None, offset: float) -> Norm | None:
    return None if name is None else read_norm(getattr(parent, name), offset)


# --- decoder ---------------------------------------------------------------------------------------------------


@can_return_tuple
def decoder_forward(
    decoder: Any,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Embeddings, layers over one flat token stream, final norm. Rows with padding are packed and unpacked again.

    Shapes: input_ids [B, S] -> last_hidden_state [B, S, H]. With `cu_seq_lens_q` the single row is a packed stream.
    """
    binding: Binding = decoder.pronghorn_binding
    token_types = None
    if isinstance(attention_mask, RowLayout):
        attention_mask, token_types, described = attention_mask.unpack()
        kwargs |= described
    balance = kwargs.pop(BALANCE, None)
    reason = binding.why_stock(
        decoder, attention_mask, past_key_values, use_cache, kwargs, balanced=balance is not None
    )
    if reason is not None:
        if reason:
            binding.tell_once(reason)
        return type(decoder).forward(
            decoder,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
    # No name is given to the embeddings, which would hold them until the last layer.
    hidden_states, stream = flatten_rows(
        _embedded(decoder, binding, input_ids, inputs_embeds), attention_mask, position_ids, kwargs
    )
    if token_types is not None:
        stream = with_image_blocks(stream, token_types)
    call = LayerCall.of(
        binding,
        hidden_states,
        stream,
        dropout_seed(decoder.training),
        binding.new_stash(hidden_states.device) if torch.is_grad_enabled() else None,
        binding.packed,
        balance,
    )
    deepstack, visual = _deepstack(stream, kwargs)
    # Here, not in a function of its own: its caller would hold the first layer's input until the last one.
    for index, layer in enumerate(decoder.layers[: decoder.config.num_hidden_layers]):
        # Module.__call__, so that hooks run but Transformers' checkpoint wrapper does not: saves are ours to plan.
        hidden_states = torch.nn.Module.__call__(layer, hidden_states, pronghorn=call)
        if visual is not None and index < len(deepstack):
            hidden_states = hidden_states.index_add(0, visual, deepstack[index].to(hidden_states.dtype))
    hidden_states = read_norm(decoder.norm, binding.family.norm_offset)(hidden_states)
    output = BaseModelOutputWithPast if binding.family.mixture is None else MoeModelOutputWithPast
    return output(last_hidden_state=unflatten_rows(hidden_states, stream))


def _embedded(
    decoder: Any, binding: Binding, input_ids: Tensor | None, inputs_embeds: Tensor | None
) -> Tensor:
    """Embeddings [B, S, H] of whichever was given, scaled as the family does.

    Raises:
        ValueError: both were given, or neither.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if inputs_embeds is None:
        inputs_embeds = decoder.embed_tokens(input_ids)
    if binding.scales.embedding != 1.0:
        inputs_embeds = inputs_embeds * binding.scales.embedding
    return inputs_embeds


def _deepstack(stream: Stream, kwargs: Mapping[str, Any]) -> tuple[Sequence[Tensor], Tensor | None]:
    """What a vision tower's earlier layers gave, added after as many first layers (DeepStack, arXiv 2406.04334), and
    the rows of the stream that it is added to."""
    given = kwargs.get("deepstack_visual_embeds") or ()
    rows = kwargs.get("visual_rows")
    if given and rows is None:
        rows = visual_rows(kwargs["visual_pos_masks"], stream)
    return given, rows


# --- causal LM -------------------------------------------------------------------------------------------------


@can_return_tuple
def causal_lm_forward(
    model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    *,
    num_items_in_batch: Tensor | int | None = None,
    loss_rows: Tensor | None = None,
    return_logits: bool | None = None,
    **kwargs: Any,
) -> Any:
    """The model's forward; with labels, the loss is computed from supervised rows only and no full logits exist.

        loss = Σ_{t: labels[t+1] ≠ -100} CE(logits[t], labels[t+1]) / num_items_in_batch   (None: their number)

    With `output_router_logits` a mixture's balance is added (`engine.mixture.with_balance`).

    Args:
        loss_rows: flat positions t with a supervised successor, where the caller knows them without asking the GPU.
        return_logits: compute logits beside the loss; None does so in evaluation mode only.
    """
    binding: Binding = model.pronghorn_binding
    rows_mask = attention_mask
    attention_mask, kwargs = past_wrapper(
        binding, attention_mask, past_key_values, use_cache, kwargs, embedded=inputs_embeds is not None
    )
    inputs: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
        "return_dict": True,
    }
    head = None if labels is None else _head_of_loss(model, binding, kwargs)
    if labels is None or head is None:
        if num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        return type(model).forward(model, labels=labels, logits_to_keep=logits_to_keep, **inputs, **kwargs)
    balance = balance_of(binding, labels, kwargs)
    if balance is not None:
        kwargs = {**kwargs, "output_router_logits": True, BALANCE: balance}
    outputs = model.model(**inputs, **kwargs)
    if loss_rows is None and isinstance(rows_mask, Tensor) and rows_mask.shape == labels.shape:
        labels = without_padding(labels, rows_mask)
    space = space_of(binding.save_levels, binding.tile_rows)
    rows, targets = supervised_rows(outputs.last_hidden_state, labels, loss_rows)
    wants_logits = not model.training if return_logits is None else return_logits
    logits = scaled_logits(model.lm_head(outputs.last_hidden_state), binding.scales) if wants_logits else None
    # What the final norm gave is not held beside the loss's own tensors.
    router_logits, cache, states, attentions = (
        outputs.get(name) for name in ("router_logits", "past_key_values", "hidden_states", "attentions")
    )
    del outputs
    loss, num_correct = summed_loss(head, rows, targets, num_items_in_batch, space, binding.scales)
    aux_loss = None
    if balance is not None:
        loss, aux_loss = with_balance(
            model, balance, loss, labels, num_items_in_batch, router_logits, rows_mask
        )
    return LossOutput(
        loss=loss,
        logits=logits,
        past_key_values=cache,
        hidden_states=states,
        attentions=attentions,
        num_correct=num_correct,
        aux_loss=aux_loss,
    )


def image_text_forward(
    model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    *,
    pixel_values: Tensor | None = None,
    pixel_values_videos: Tensor | None = None,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    mm_token_type_ids: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """`causal_lm_forward` of a model that reads images. Transformers' `generate` goes by the names in a signature."""
    images = {
        "pixel_values": pixel_values,
        "pixel_values_videos": pixel_values_videos,
        "image_grid_thw": image_grid_thw,
        "video_grid_thw": video_grid_thw,
        "second_per_grid_ts": second_per_grid_ts,
        "token_type_ids": token_type_ids,
        "mm_token_type_ids": mm_token_type_ids,
    }
    return causal_lm_forward(
        model,
        input_ids,
        attention_mask,
        position_ids,
        past_key_values,
        inputs_embeds,
        labels,
        use_cache,
        logits_to_keep,
        **{name: value for name, value in images.items() if value is not None},
        **kwargs,
    )


def _loss_of_its_own(model: Any, binding: Binding, kwargs: dict[str, Any]) -> bool:
    """Whether a loss other than the shifted cross-entropy of `labels` was asked for; it needs full logits."""
    if "_loss_function" in model.__dict__:
        binding.tell_once("the model has a loss_function of its own, which takes full logits")
        return True
    return kwargs.get("shift_labels") is not None


def _head_of_loss(model: Any, binding: Binding, kwargs: dict[str, Any]) -> LinearProjection | None:
    """The head that our loss multiplies by; None (said once) where the loss needs full logits."""
    return None if _loss_of_its_own(model, binding, kwargs) else readable_head(model, binding)


def readable_head(model: Any, binding: Binding) -> LinearProjection | None:
    """The lm_head as a projection, or None (said once) when only its own forward can run it."""
    module = active_module(model.lm_head)
    projection = read_projection(module, Reading(model.training), 7)
    if isinstance(projection, LinearProjection) and len(projection.adapters) <= 1:
        adapter = projection.adapters[0] if projection.adapters else None
        if adapter is None or (adapter.dropout == 0.0 and adapter.b_bias is None):
            return projection
        reason = "its adapter has dropout or a bias"
    else:
        reason = (
            projection.reason if not isinstance(projection, LinearProjection) else "it has several adapters"
        )
    binding.tell_once(f"lm_head runs through its own forward, with full logits: {reason}")
    return None
