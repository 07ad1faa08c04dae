"""Qwen3.5: linear attention by the gated delta rule in most layers, attention with a gated output in the others.

Checkpoints are of the model for images, `Qwen3_5ForConditionalGeneration`; the text part alone loads as a causal LM.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pronghorn.families.spec import DecoderFamily, DeltaParts, LayerParts

_RECURRENT = LayerParts(attention="linear_attn", o="out_proj", delta=DeltaParts())
_PARTS = LayerParts(q_norm="q_norm", k_norm="k_norm", gated=True, recurrent=_RECURRENT)


def _unsupported(config: Any) -> str | None:
    """no layer of full attention."""
    return None if "full_attention" in config.layer_types else "no layer of full attention"


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
QWEN3_5_VISION = replace(
    QWEN3_5,
    name="Qwen3.5 (images)",
    model_types=("qwen3_5",),
    causal_lm="Qwen3_5ForConditionalGeneration",
    path="model.language_model",
)
