"""Gemma 1, 2 and 3 (text): norms by 1 + w, embeddings that scale themselves, tanh-GELU.

Gemma 2 adds norms of what attention and MLP give, caps on both kinds of logits and windows in every other layer; Gemma
3 norms of q and k in place of the caps, and angles of their own for the layers with a window.
"""

from typing import Any

from pronghorn.families.spec import (
    DecoderFamily,
    LayerParts,
    Scales,
    rotation_by_layer_type,
    window_by_layer_type,
)


def _attends_both_ways(config: Any) -> str | None:
    """`use_bidirectional_attention`."""
    return "use_bidirectional_attention" if getattr(config, "use_bidirectional_attention", None) else None


def _caps(config: Any) -> Scales:
    """Caps on the attention's logits and on the output's."""
    return Scales(
        logit_softcap=config.final_logit_softcapping,
        attention_softcap=config.attn_logit_softcapping,
    )


def _final_cap(config: Any) -> Scales:
    """A cap on the output's logits, where the config sets one."""
    # Transformers' Gemma 3 reads no cap of the attention's logits, whatever the config says.
    return Scales(logit_softcap=config.final_logit_softcapping)


_OUTPUT_NORMS: dict[str, Any] = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}

GEMMA = DecoderFamily(
    name="Gemma", model_types=("gemma",), prefix="Gemma", norm_offset=1.0, unsupported=_attends_both_ways
)
GEMMA2 = DecoderFamily(
    name="Gemma 2",
    model_types=("gemma2",),
    prefix="Gemma2",
    parts=LayerParts(**_OUTPUT_NORMS),
    window=window_by_layer_type,
    scales=_caps,
    norm_offset=1.0,
    activation="hidden_activation",
    unsupported=_attends_both_ways,
)
_GEMMA3_PARTS = LayerParts(q_norm="q_norm", k_norm="k_norm", **_OUTPUT_NORMS)
GEMMA3 = DecoderFamily(
    name="Gemma 3",
    model_types=("gemma3_text",),
    prefix="Gemma3",
    decoder="Gemma3TextModel",
    parts=_GEMMA3_PARTS,
    window=window_by_layer_type,
    rotation=rotation_by_layer_type,
    scales=_final_cap,
    norm_offset=1.0,
    activation="hidden_activation",
    unsupported=_attends_both_ways,
)
GEMMA3_VISION = DecoderFamily(
    name="Gemma 3 (images)",
    model_types=("gemma3",),
    prefix="Gemma3",
    decoder="Gemma3TextModel",
    # Its head caps no logits, whatever the config says.
    causal_lm="Gemma3ForConditionalGeneration",
    path="model.language_model",
    image_blocks=True,
    parts=_GEMMA3_PARTS,
    window=window_by_layer_type,
    rotation=rotation_by_layer_type,
    norm_offset=1.0,
    activation="hidden_activation",
    unsupported=_attends_both_ways,
)
