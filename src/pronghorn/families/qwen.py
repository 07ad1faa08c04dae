"""Qwen2 and Qwen2.5 (biases on q, k, v) and Qwen3 (q/k norms); both may slide their window in some layers."""

from pronghorn.families.spec import DecoderFamily, LayerParts, window_by_layer_type

QWEN2 = DecoderFamily(name="Qwen2", model_types=("qwen2",), prefix="Qwen2", window=window_by_layer_type)
QWEN3 = DecoderFamily(
    name="Qwen3",
    model_types=("qwen3",),
    prefix="Qwen3",
    parts=LayerParts(q_norm="q_norm", k_norm="k_norm"),
    window=window_by_layer_type,
)
