"""Qwen2 and Qwen2.5 (biases on q, k, v) and Qwen3 (q/k norms); both may slide their window in some layers."""

from typing import Any

from pronghorn.families.spec import DecoderFamily, LayerParts


def _window(config: Any, layer_index: int) -> int | None:
    layer_types = getattr(config, "layer_types", None)
    sliding = layer_types is not None and layer_types[layer_index] == "sliding_attention"
    return config.sliding_window if sliding else None


QWEN2 = DecoderFamily(name="Qwen2", model_types=("qwen2",), prefix="Qwen2", window=_window)
QWEN3 = DecoderFamily(
    name="Qwen3",
    model_types=("qwen3",),
    prefix="Qwen3",
    parts=LayerParts(q_norm="q_norm", k_norm="k_norm"),
    window=_window,
)
