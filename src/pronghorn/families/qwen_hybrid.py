"""Qwen3-Next and Qwen3.5: linear attention by the gated delta rule in most layers, attention with a gated output in the
others; the mixtures have a shared expert behind a gate.

Checkpoints of Qwen3.5 are of the model for images, `Qwen3_5ForConditionalGeneration`; the text part alone loads as a
causal LM.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pronghorn.families import qwen_moe
from pronghorn.families.mixture import MixtureParts, mixture_everywhere, plain_gating
from pronghorn.families.spec import DecoderFamily, DeltaParts, LayerParts
from pronghorn.kernels.routing import Scoring

_RECURRENT = LayerParts(attention="linear_attn", o="out_proj", delta=DeltaParts())
_PARTS = LayerParts(q_norm="q_norm", k_norm="k_norm", gated=True, recurrent=_RECURRENT)
_FUSED = replace(_RECURRENT, delta=DeltaParts(inputs=("in_proj_qkvz", "in_proj_ba")))


def _unsupported(config: Any) -> str | None:
    """no layer of full attention, or an activation other than SiLU, which the convolution takes, too."""
    if config.hidden_act != "silu":
        return f"hidden_act={config.hidden_act!r} after the convolution"
    return None if "full_attention" in config.layer_types else "no layer of full attention"


def _scoring(config: Any) -> Scoring:
    return Scoring(config.num_experts, config.num_experts_per_tok)


def _shared_intermediate(config: Any) -> int:
    return int(config.shared_expert_intermediate_size)


QWEN3_NEXT = DecoderFamily(
    name="Qwen3-Next",
    model_types=("qwen3_next",),
    prefix="Qwen3Next",
    parts=replace(_PARTS, recurrent=_FUSED),
    mlp=qwen_moe.QWEN2_MOE.mlp,
    mixture=qwen_moe.QWEN2_MOE.mixture,
    norm_offset=1.0,
    unsupported=_unsupported,
)
QWEN3_5 = DecoderFamily(
    name="Qwen3.5",
    model_types=("qwen3_5_text",),
    prefix="Qwen3_5",
    decoder="Qwen3_5TextModel",
    rotary="Qwen3_5TextRotaryEmbedding",
    parts=_PARTS,
    norm_offset=1.0,
    unsupported=_unsupported,
)
QWEN3_5_MOE = replace(
    QWEN3_5,
    name="Qwen3.5-MoE",
    model_types=("qwen3_5_moe_text",),
    prefix="Qwen3_5Moe",
    decoder="Qwen3_5MoeTextModel",
    rotary="Qwen3_5MoeTextRotaryEmbedding",
    mlp=mixture_everywhere,
    mixture=MixtureParts(
        _scoring,
        plain_gating,
        shared="shared_expert",
        shared_gate="shared_expert_gate",
        shared_intermediate=_shared_intermediate,
    ),
)
QWEN3_5_VISION = replace(
    QWEN3_5,
    name="Qwen3.5 (images)",
    model_types=("qwen3_5",),
    causal_lm="Qwen3_5ForConditionalGeneration",
    path="model.language_model",
)
QWEN3_5_MOE_VISION = replace(
    QWEN3_5_MOE,
    name="Qwen3.5-MoE (images)",
    model_types=("qwen3_5_moe",),
    causal_lm="Qwen3_5MoeForConditionalGeneration",
    path="model.language_model",
)
