"""Mistral: Llama with a sliding attention window in every layer, where the config sets one. Ministral slides it in some
layers; Ministral 3 lets queries grow with their position instead, beyond the length it was first trained at."""

from typing import Any

from pronghorn.families.spec import DecoderFamily, Scales, window_by_layer_type, window_everywhere


def _growing_queries(config: Any) -> Scales:
    """Queries that grow with their position."""
    rope = config.rope_parameters
    beta, length = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    return Scales(query_growth=(float(beta), int(length)) if beta and length else None)


FAMILY = DecoderFamily(name="Mistral", model_types=("mistral",), prefix="Mistral", window=window_everywhere)
MINISTRAL = DecoderFamily(
    name="Ministral", model_types=("ministral",), prefix="Ministral", window=window_by_layer_type
)
MINISTRAL3 = DecoderFamily(
    name="Ministral 3",
    model_types=("ministral3",),
    prefix="Ministral3",
    window=window_everywhere,
    scales=_growing_queries,
)
