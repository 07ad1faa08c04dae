"""Qwen2-MoE (with a shared expert behind a gate) and Qwen3-MoE; both may have dense layers in between."""

from typing import Any

from pronghorn.families.mixture import MOE, MixtureParts, plain_gating
from pronghorn.families.spec import DecoderFamily, LayerParts, window_by_layer_type, window_everywhere
from pronghorn.kernels.routing import Scoring


def _mlp(config: Any, layer_index: int) -> str:
    dense = layer_index in config.mlp_only_layers or config.num_experts == 0
    return "glu" if dense or (layer_index + 1) % config.decoder_sparse_step else MOE


def _scoring(config: Any) -> Scoring:
    return Scoring(config.num_experts, config.num_experts_per_tok, normalised=config.norm_topk_prob)


def _shared_intermediate(config: Any) -> int:
    return int(config.shared_expert_intermediate_size)


QWEN2_MOE = DecoderFamily(
    name="Qwen2-MoE",
    model_types=("qwen2_moe",),
    prefix="Qwen2Moe",
    mlp=_mlp,
    mixture=MixtureParts(
        _scoring,
        plain_gating,
        shared="shared_expert",
        shared_gate="shared_expert_gate",
        shared_intermediate=_shared_intermediate,
    ),
    window=window_by_layer_type,
)
QWEN3_MOE = DecoderFamily(
    name="Qwen3-MoE",
    model_types=("qwen3_moe",),
    prefix="Qwen3Moe",
    parts=LayerParts(q_norm="q_norm", k_norm="k_norm"),
    mlp=_mlp,
    mixture=MixtureParts(_scoring, plain_gating),
    window=window_everywhere,
)
