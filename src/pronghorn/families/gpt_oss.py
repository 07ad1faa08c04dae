"""gpt-oss: attention sinks, alternating windows, and a mixture of clamped SwiGLU experts with biases.

gate and up lie in alternating columns of one stack, which is stored [E, in, out].
"""

from typing import Any

from pronghorn.families.mixture import MixtureParts, local_experts, mixture_everywhere
from pronghorn.families.spec import DecoderFamily, LayerParts, window_by_layer_type
from pronghorn.kernels.grouped_glu import CLAMPED, Gating


def _gating(experts: Any, activation: str) -> Gating:
    return Gating(CLAMPED, interleaved=True, alpha=experts.alpha, limit=experts.limit)


FAMILY = DecoderFamily(
    name="gpt-oss",
    model_types=("gpt_oss",),
    prefix="GptOss",
    parts=LayerParts(sinks="sinks"),
    mlp=mixture_everywhere,
    mixture=MixtureParts(
        local_experts,
        _gating,
        block="MLP",
        router="router",
        transposed=True,
        intermediate="intermediate_size",
    ),
    window=window_by_layer_type,
)
