"""SmolLM3: Llama in which every fourth layer does not rotate q and k, and layers may slide their window."""

from typing import Any

from pronghorn.families.spec import ONE_ROTATION, DecoderFamily, window_by_layer_type


def _rotation(config: Any, layer_index: int) -> str | None:
    """Layers that do not rotate, as `no_rope_layers` says."""
    return ONE_ROTATION if config.no_rope_layers[layer_index] else None


FAMILY = DecoderFamily(
    name="SmolLM3",
    model_types=("smollm3",),
    prefix="SmolLM3",
    window=window_by_layer_type,
    rotation=_rotation,
)
