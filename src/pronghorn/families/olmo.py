"""OLMo 2 and OLMo 3, and EXAONE 4: norms of what attention and MLP give, none in front of them, and norms of q and k.

OLMo's are of all heads at once, EXAONE's of each. OLMo 3 has windows in most layers; EXAONE 4 (32B), too, and layers
without one do not rotate.
"""

from dataclasses import replace
from typing import Any

from pronghorn.families.spec import (
    ONE_ROTATION,
    DecoderFamily,
    LayerParts,
    rotation_by_layer_type,
    window_by_layer_type,
)

_EXAONE_PARTS = LayerParts(
    input_norm=None,
    q_norm="q_norm",
    k_norm="k_norm",
    attention_output_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_output_norm="post_feedforward_layernorm",
)
_PARTS = replace(_EXAONE_PARTS, norms_of_all_heads=True)


def _rotation_in_windows(config: Any, layer_index: int) -> str | None:
    """Where there are windows, layers without one do not rotate."""
    sliding = config.layer_types[layer_index] == "sliding_attention"
    return ONE_ROTATION if config.sliding_window is None or sliding else None


OLMO2 = DecoderFamily(name="OLMo 2", model_types=("olmo2",), prefix="Olmo2", parts=_PARTS)
OLMO3 = DecoderFamily(
    name="OLMo 3",
    model_types=("olmo3",),
    prefix="Olmo3",
    parts=_PARTS,
    window=window_by_layer_type,
    rotation=rotation_by_layer_type,
)
EXAONE4 = DecoderFamily(
    name="EXAONE 4",
    model_types=("exaone4",),
    prefix="Exaone4",
    parts=_EXAONE_PARTS,
    window=window_by_layer_type,
    rotation=_rotation_in_windows,
)
