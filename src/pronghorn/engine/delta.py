"""From a layer's live linear attention to the block that computes it."""

from __future__ import annotations

from typing import Any

from pronghorn.blocks import DeltaNetBlock, ProjectionGroup
from pronghorn.blocks.delta_net import DeltaHeads
from pronghorn.engine.layer_call import LayerCall, ReadGroups
from pronghorn.engine.read import active_module, read_norm
from pronghorn.families import DELTA
from pronghorn.families.spec import DeltaParts


def delta_net_block(layer: Any, call: LayerCall, read: ReadGroups) -> DeltaNetBlock:
    """The first half of a layer whose attention is the gated delta rule."""
    family = call.binding.family
    parts = family.parts.of(layer)
    attention, delta = getattr(layer, parts.attention), parts.delta
    assert delta is not None and parts.input_norm is not None
    groups = {slot: ProjectionGroup(*found) for slot, found in read.items() if slot in (DELTA, 3)}
    conv: Any = active_module(getattr(attention, delta.conv))
    return DeltaNetBlock(
        norm=read_norm(getattr(layer, parts.input_norm), family.norm_offset),
        inputs=groups[DELTA],
        o=groups[3],
        heads=delta_heads(attention, delta),
        conv=conv.weight,
        conv_bias=conv.bias,
        decay=attention._parameters[delta.decay],
        dt_bias=attention._parameters[delta.dt_bias],
        # Of the rule's output, which no family multiplies by 1 + w.
        head_norm=read_norm(getattr(attention, delta.norm), 0.0),
        docs=call.stream.docs,
    )


def delta_heads(attention: Any, parts: DeltaParts) -> DeltaHeads:
    """Heads of a live linear attention."""
    return DeltaHeads(
        attention.num_k_heads,
        attention.head_k_dim,
        attention.num_v_heads,
        attention.head_v_dim,
        by_keys=len(parts.inputs) == 2,
    )
