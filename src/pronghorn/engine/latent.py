"""From a layer's live latent attention to the block that computes it."""

from __future__ import annotations

from typing import Any

from pronghorn.blocks import LatentAttentionBlock, ProjectionGroup
from pronghorn.blocks.latent_attention import Raised
from pronghorn.engine.layer_call import LayerCall, ReadGroups
from pronghorn.engine.read import read_norm
from pronghorn.families import KV_UP, Q_UP
from pronghorn.kernels.attention import AttentionCall


def latent_attention_block(layer: Any, call: LayerCall, read: ReadGroups) -> LatentAttentionBlock:
    """The first half of a layer whose attention is latent."""
    binding, parts = call.binding, call.binding.family.parts
    attention, latent, offset = getattr(layer, parts.attention), parts.latent, binding.family.norm_offset
    assert latent is not None and parts.input_norm is not None
    groups = {slot: ProjectionGroup(*found) for slot, found in read.items()}

    def raised(norm: str, slot: int) -> Raised:
        return Raised(read_norm(getattr(attention, norm), offset), groups[slot])

    index, half = binding.layer_index(layer), attention.qk_rope_head_dim // 2
    # Each angle stands there once, or once more for the second half.
    cos, sin = (angle[:, :half] for angle in call.angles[binding.family.rotation(binding.config, index)])
    backend = binding.attention_backend(cos.device, call.dtype, binding.head_dim)
    return LatentAttentionBlock(
        norm=read_norm(getattr(layer, parts.input_norm), offset),
        codes=groups[0],
        q_up=None if latent.q_norm is None else raised(latent.q_norm, Q_UP),
        kv_up=raised(latent.kv_norm, KV_UP),
        o=groups[3],
        heads=binding.config.num_attention_heads,
        nope=attention.qk_nope_head_dim,
        cos=cos,
        sin=sin,
        pairs=latent.pairs,
        docs=call.stream.docs,
        call=AttentionCall(float(attention.scaling), None, backend),
        output_scale=binding.scales.residual,
    )
