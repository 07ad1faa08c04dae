"""Cohere (Command R and R+, Aya 23 and Expanse) and Cohere 2 (Command R7B and A): attention and MLP side by side on one
LayerNorm without bias, RoPE of neighbouring pairs, a factor of the logits.
"""

from typing import Any

from pronghorn.families.spec import ONE_ROTATION, DecoderFamily, LayerParts, Scales, window_by_layer_type


def _parts(config: Any) -> LayerParts:
    """Norms of q and k, a weight for each head, where the config says so (`use_qk_norm`)."""
    if getattr(config, "use_qk_norm", False):
        return LayerParts(mlp_norm=None, q_norm="q_norm", k_norm="k_norm", norms_of_all_heads=True)
    return LayerParts(mlp_norm=None)


def _logit_scale(config: Any) -> Scales:
    """A factor of the output logits."""
    return Scales(logits=float(config.logit_scale))


def _rotation(config: Any, layer_index: int) -> str | None:
    """Layers without a window do not rotate."""
    return None if window_by_layer_type(config, layer_index) is None else ONE_ROTATION


COHERE = DecoderFamily(
    name="Cohere",
    model_types=("cohere",),
    prefix="Cohere",
    parts=LayerParts(mlp_norm=None),
    parts_of=_parts,
    turns="pairs",
    angles="pairs",
    scales=_logit_scale,
)
COHERE2 = DecoderFamily(
    name="Cohere 2",
    model_types=("cohere2",),
    prefix="Cohere2",
    parts=LayerParts(mlp_norm=None),
    window=window_by_layer_type,
    rotation=_rotation,
    turns="pairs",
    angles="pairs",
    scales=_logit_scale,
)
