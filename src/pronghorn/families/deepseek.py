"""DeepSeek-V2 and V3 (and R1, which is a V3), and what took over their latent attention: GLM-4 MoE Lite; without
experts Youtu and MiniCPM3. The distills of R1 are Llama and Qwen2 models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pronghorn.families.mixture import MOE, MixtureParts, plain_gating
from pronghorn.families.spec import DecoderFamily, LatentParts, LayerParts, Scales
from pronghorn.kernels.routing import Scoring


def _parts(config: Any) -> LayerParts:
    """Latent attention, with or without a code for q."""
    return _latent(config, bool(getattr(config, "rope_interleave", True)))


def _parts_turning_halves(config: Any) -> LayerParts:
    """Latent attention, with or without a code for q."""
    return _latent(config, False)


def _latent(config: Any, pairs: bool) -> LayerParts:
    if config.q_lora_rank is None:
        return LayerParts(latent=LatentParts(q="q_proj", q_norm=None, q_up=None, pairs=pairs))
    return LayerParts(latent=LatentParts(pairs=pairs))


def _unsupported(config: Any) -> str | None:
    """values of heads wider than keys (`v_head_dim`)."""
    of_keys = config.qk_nope_head_dim + config.qk_rope_head_dim
    if config.v_head_dim > of_keys:
        return f"v_head_dim={config.v_head_dim}: values wider than keys, which have {of_keys}"
    return None


def _unsupported_v2(config: Any) -> str | None:
    """values of heads wider than keys (`v_head_dim`), or a `topk_method` other than greedy."""
    if config.topk_method not in ("greedy", "group_limited_greedy"):
        return f"topk_method={config.topk_method!r}"
    return _unsupported(config)


def _dense_first(config: Any, layer_index: int) -> str:
    return MOE if layer_index >= config.first_k_dense_replace else "glu"


def _by_layer_type(config: Any, layer_index: int) -> str:
    return MOE if config.mlp_layer_types[layer_index] == "sparse" else "glu"


def _softmax_scoring(config: Any) -> Scoring:
    # Transformers' V2 leaves the weights as they are, whatever norm_topk_prob says.
    in_groups = config.topk_method == "group_limited_greedy"
    return Scoring(
        config.n_routed_experts,
        config.num_experts_per_tok,
        normalised=False,
        scale=float(config.routed_scaling_factor),
        groups=config.n_group if in_groups else 1,
        top_groups=config.topk_group if in_groups else 1,
        wide_logits=True,
    )


def _sigmoid_scoring(config: Any) -> Scoring:
    return Scoring(
        config.n_routed_experts,
        config.num_experts_per_tok,
        normalised=bool(config.norm_topk_prob),
        sigmoid=True,
        scale=float(config.routed_scaling_factor),
        groups=config.n_group,
        top_groups=config.topk_group,
        group_scores=2,
        wide_logits=True,
    )


def _shared_intermediate(config: Any) -> int:
    return int(config.moe_intermediate_size * config.n_shared_experts)


def _factors(config: Any) -> Scales:
    """Factors of both residual branches and of the output logits."""
    return Scales(
        residual=config.scale_depth / config.num_hidden_layers**0.5, logits=1.0 / config.logits_scaling
    )


_MIXTURE = MixtureParts(
    _sigmoid_scoring,
    plain_gating,
    block="MoE",
    router_class="TopkRouter",
    router_bias="e_score_correction_bias",
    shared="shared_experts",
    shared_intermediate=_shared_intermediate,
    balanced=False,
)

DEEPSEEK_V2 = DecoderFamily(
    name="DeepSeek-V2",
    model_types=("deepseek_v2",),
    prefix="DeepseekV2",
    parts_of=_parts,
    mlp=_dense_first,
    mixture=replace(_MIXTURE, scoring=_softmax_scoring, block="Moe", router_bias=None),
    unsupported=_unsupported_v2,
)
DEEPSEEK_V3 = DecoderFamily(
    name="DeepSeek-V3",
    model_types=("deepseek_v3",),
    prefix="DeepseekV3",
    parts_of=_parts,
    mlp=_dense_first,
    mixture=_MIXTURE,
    unsupported=_unsupported,
)
GLM4_MOE_LITE = DecoderFamily(
    name="GLM-4 MoE Lite",
    model_types=("glm4_moe_lite",),
    prefix="Glm4MoeLite",
    parts_of=_parts,
    mlp=_by_layer_type,
    mixture=_MIXTURE,
    unsupported=_unsupported,
)
MINICPM3 = DecoderFamily(
    name="MiniCPM3",
    model_types=("minicpm3",),
    prefix="MiniCPM3",
    parts_of=_parts_turning_halves,
    scales=_factors,
    unsupported=_unsupported,
)
YOUTU = DecoderFamily(
    name="Youtu",
    model_types=("youtu",),
    prefix="Youtu",
    parts_of=_parts,
    unsupported=_unsupported,
)
