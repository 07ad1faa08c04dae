"""Qwen2 and Qwen2.5 (biases on q, k, v) and Qwen3 (q/k norms); both may slide their window in some layers.

Their text parts in Qwen2-VL, Qwen2.5-VL and Qwen3-VL turn parts of each head by a token's time, height and width.
"""

from pronghorn.families.spec import DecoderFamily, LayerParts, window_by_layer_type

QWEN2 = DecoderFamily(name="Qwen2", model_types=("qwen2",), prefix="Qwen2", window=window_by_layer_type)
QWEN3 = DecoderFamily(
    name="Qwen3",
    model_types=("qwen3",),
    prefix="Qwen3",
    parts=LayerParts(q_norm="q_norm", k_norm="k_norm"),
    window=window_by_layer_type,
)
QWEN2_VL = DecoderFamily(
    name="Qwen2-VL",
    model_types=("qwen2_vl", "qwen2_vl_text"),
    prefix="Qwen2VL",
    decoder="Qwen2VLTextModel",
    causal_lm="Qwen2VLForConditionalGeneration",
    mlp_class="Qwen2MLP",
    path="model.language_model",
    window=window_by_layer_type,
)
QWEN2_5_VL = DecoderFamily(
    name="Qwen2.5-VL",
    model_types=("qwen2_5_vl", "qwen2_5_vl_text"),
    prefix="Qwen2_5_VL",
    decoder="Qwen2_5_VLTextModel",
    causal_lm="Qwen2_5_VLForConditionalGeneration",
    mlp_class="Qwen2MLP",
    path="model.language_model",
    window=window_by_layer_type,
)
QWEN3_VL = DecoderFamily(
    name="Qwen3-VL",
    model_types=("qwen3_vl", "qwen3_vl_text"),
    prefix="Qwen3VLText",
    causal_lm="Qwen3VLForConditionalGeneration",
    path="model.language_model",
    parts=LayerParts(q_norm="q_norm", k_norm="k_norm"),
)
