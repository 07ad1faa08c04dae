"""How llama.cpp writes down each trained family: its architecture's name, what differs, and what it cannot compute."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pronghorn.errors import NotExportable
from pronghorn.export.gguf.latent import describe_latent, leading_dense_layers
from pronghorn.export.gguf.recurrent import describe_recurrent, full_attention_interval, turns_whole_width
from pronghorn.export.gguf.rope import rope_of
from pronghorn.families.spec import ACTIVATIONS

logger = logging.getLogger("pronghorn")

#: llama.cpp scales attention by the hidden size for the largest Gemmas, which it knows by their number of layers.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3_text": 62}
#: Every n-th layer of a Gemma attends to all tokens, the others to a window.
_GEMMA_PATTERN = {"gemma2": 2, "gemma3_text": 6}

#: Layers of the Command R+, in whose size llama.cpp knows that q and k have norms.
_COMMAND_R_PLUS_LAYERS = 64
#: Layers of the DeepSeeks without a code of q, which it knows by that.
_LITE_LAYERS = (26, 27)

#: Whether the weights of the chosen experts are made to sum to one.
_NORMALISES = {"qwen2_moe": False, "qwen3_moe": True}


def _nothing(*_: Any) -> None:
    """A family with no check or metadata of its own."""


@dataclass(frozen=True)
class GgufFamily:
    """One of llama.cpp's architectures, for one of Transformers' model types.

    Args:
        architecture: llama.cpp's name of it.
        activation: what it computes in the MLP.
        permutes: it rotates neighbouring pairs of q and k, where Transformers rotates the two halves of a head.
        norm_offset: Transformers multiplies by (offset + weight) in norms; in a file the sum stands.
        partial_rotary: it can rotate a part of each head.
        in_transformers: whether Transformers reads such files.
        check: raises `NotExportable` for settings of a config that it would compute otherwise.
        describe: writes metadata that only this family has.
    """

    architecture: str
    activation: str = "silu"
    permutes: bool = False
    norm_offset: float = 0.0
    partial_rotary: bool = False
    in_transformers: bool = True
    check: Callable[[Any], None] = _nothing
    describe: Callable[[Any, Any], None] = _nothing


def _warn_of_window(config: Any) -> None:
    window = getattr(config, "sliding_window", None)
    used = window and getattr(config, "use_sliding_window", True)
    if used and window < config.max_position_embeddings:
        logger.warning(
            "pronghorn: llama.cpp has no sliding window for %s models: beyond %d tokens its answers differ",
            config.model_type,
            window,
        )


def _check_gemma(config: Any) -> None:
    """Raises:
    NotExportable: for another attention scale, or another order of windowed layers, than llama.cpp has built in.
    """
    kind, layers = config.model_type, int(config.num_hidden_layers)
    large = layers == _GEMMA_27B_LAYERS[kind]
    scale = config.hidden_size // config.num_attention_heads if large else config.head_dim
    if config.query_pre_attn_scalar != scale:
        raise _computed_otherwise(kind, f"query_pre_attn_scalar={config.query_pre_attn_scalar}", f"{scale}")
    every = _GEMMA_PATTERN[kind]
    expected = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    if list(config.layer_types) != expected:
        raise _computed_otherwise(
            kind, "other layers with a sliding window", f"full attention in every {every}. layer"
        )


def _describe_gemma(writer: Any, config: Any) -> None:
    writer.add_sliding_window(int(config.sliding_window))
    if (cap := getattr(config, "attn_logit_softcapping", None)) is not None:
        writer.add_attn_logit_softcapping(float(cap))
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        writer.add_final_logit_softcapping(float(cap))


def _check_gemma3(config: Any) -> None:
    """Raises:
    NotExportable: for what `_check_gemma` refuses, softcapping, and scaled RoPE in windowed layers.
    """
    _check_gemma(config)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise _computed_otherwise("gemma3_text", f"{name}={getattr(config, name)}", "none")
    if config.rope_parameters["sliding_attention"].get("rope_type", "default") != "default":
        raise _computed_otherwise("gemma3_text", "scaled RoPE in windowed layers", "no scaling there")


def _describe_gemma3(writer: Any, config: Any) -> None:
    _describe_gemma(writer, config)
    writer.add_rope_freq_base_swa(float(config.rope_parameters["sliding_attention"]["rope_theta"]))


def _describe_phi3(writer: Any, config: Any) -> None:
    writer.add_sliding_window(int(config.sliding_window or 0))


def _describe_granite(writer: Any, config: Any) -> None:
    writer.add_embedding_scale(float(config.embedding_multiplier))
    writer.add_residual_scale(float(config.residual_multiplier))
    writer.add_attention_scale(float(config.attention_multiplier))
    writer.add_logit_scale(float(config.logits_scaling))


def _check_cohere(config: Any) -> None:
    """Raises:
    NotExportable: for biases, and for norms of q and k in fewer layers than llama.cpp reads them for.
    """
    if getattr(config, "attention_bias", False):
        raise _computed_otherwise(config.model_type, "biases", "none")
    large = int(config.num_hidden_layers) >= _COMMAND_R_PLUS_LAYERS
    if config.model_type == "cohere" and bool(config.use_qk_norm) is not large:
        given = f"use_qk_norm={config.use_qk_norm} in {config.num_hidden_layers} layers"
        raise _computed_otherwise(
            "cohere", given, f"norms of q and k from {_COMMAND_R_PLUS_LAYERS} layers on"
        )


def _check_cohere2(config: Any) -> None:
    """Raises:
    NotExportable: for what `_check_cohere` refuses, and another order of windowed layers.
    """
    _check_cohere(config)
    _check_every_fourth(
        "cohere2", "with a sliding window", [t == "full_attention" for t in config.layer_types]
    )


def _check_every_fourth(kind: str, what: str, others: Sequence[bool]) -> None:
    """Raises:
    NotExportable: where it is not every fourth layer that differs from the others.
    """
    if list(others) != [(i + 1) % 4 == 0 for i in range(len(others))]:
        raise _computed_otherwise(kind, f"other layers {what}", "another kind in every 4. layer")


def _check_olmo3(config: Any) -> None:
    """Raises:
    NotExportable: for another order of windowed layers, or a rotation of theirs that is not the others' unscaled one.
    """
    full, windowed = (config.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    if windowed.get("rope_type", "default") != "default" or windowed["rope_theta"] != full["rope_theta"]:
        raise _computed_otherwise("olmo3", "another RoPE in windowed layers", "the others' without scaling")
    _check_every_fourth("olmo3", "with a sliding window", [t == "full_attention" for t in config.layer_types])


def _check_exaone4(config: Any) -> None:
    """Raises:
    NotExportable: for windows, which llama.cpp knows by the size of the 32B alone.
    """
    if config.sliding_window is not None:
        raise _computed_otherwise("exaone4", f"sliding_window={config.sliding_window}", "none in most sizes")


def _check_smollm3(config: Any) -> None:
    """Raises:
    NotExportable: for another order of layers that do not rotate.
    """
    _check_every_fourth("smollm3", "that rotate", [not rotates for rotates in config.no_rope_layers])
    _warn_of_window(config)


def _describe_window(writer: Any, config: Any) -> None:
    writer.add_sliding_window(int(config.sliding_window))


def _describe_cohere(writer: Any, config: Any) -> None:
    writer.add_logit_scale(float(config.logit_scale))
    if (window := getattr(config, "sliding_window", None)) is not None:
        writer.add_sliding_window(int(window))


def _check_latent(config: Any) -> None:
    """Raises:
    NotExportable: for another rotation, choice of experts or order of layers than llama.cpp has.
    """
    kind, rope = config.model_type, rope_of(config)
    if not getattr(config, "rope_interleave", True):
        raise _computed_otherwise(kind, "rope_interleave=False", "rotation of neighbouring pairs")
    if config.attention_bias:
        raise _computed_otherwise(kind, "biases", "none")
    if (config.q_lora_rank is None) is not (config.num_hidden_layers in _LITE_LAYERS):
        given = f"q_lora_rank={config.q_lora_rank} in {config.num_hidden_layers} layers"
        raise _computed_otherwise(kind, given, f"no code of q in models of {_LITE_LAYERS} layers")
    if rope.get("rope_type") == "yarn" and rope.get("mscale") != rope.get("mscale_all_dim"):
        raise _computed_otherwise(kind, "mscale other than mscale_all_dim", "both the same")
    if getattr(config, "topk_method", "greedy") != "greedy":
        raise _computed_otherwise(kind, f"topk_method={config.topk_method!r}", "no groups of experts")
    kinds = getattr(config, "mlp_layer_types", None) or ()
    if "dense" in kinds[leading_dense_layers(config) :]:
        raise _computed_otherwise(kind, "layers without experts behind ones with", "the first without only")


def _check_experts(config: Any) -> None:
    """Raises:
    NotExportable: for layers without experts, or weights of chosen experts that are summed otherwise.
    """
    kind = config.model_type
    normalised = _NORMALISES[kind]
    if bool(config.norm_topk_prob) is not normalised:
        raise _computed_otherwise(kind, f"norm_topk_prob={config.norm_topk_prob}", f"{normalised}")
    if config.decoder_sparse_step != 1 or config.mlp_only_layers:
        raise _computed_otherwise(kind, "layers without experts", "experts in every layer")
    _warn_of_window(config)


def _describe_experts(writer: Any, config: Any) -> None:
    writer.add_expert_count(int(getattr(config, "num_experts", None) or config.num_local_experts))
    writer.add_expert_used_count(int(config.num_experts_per_tok))
    if (inner := getattr(config, "moe_intermediate_size", None)) is not None:
        writer.add_expert_feed_forward_length(int(inner))
    if (shared := getattr(config, "shared_expert_intermediate_size", None)) is not None:
        writer.add_expert_shared_feed_forward_length(int(shared))


def _check_recurrent(config: Any) -> None:
    """Raises:
    NotExportable: for another order of layers, biases, heads of k and v of other sizes, sections of a head that leave
        some of it out, or layers without experts.
    """
    kind = config.model_type
    if "full_attention" not in config.layer_types:
        raise _computed_otherwise(kind, "none", "layers of full attention")
    every = full_attention_interval(config)
    expected = [
        "linear_attention" if (i + 1) % every else "full_attention" for i in range(len(config.layer_types))
    ]
    if list(config.layer_types) != expected:
        raise _computed_otherwise(kind, "other layers of full attention", f"one in every {every}")
    if config.attention_bias:
        raise _computed_otherwise(kind, "biases", "none")
    if config.linear_key_head_dim != config.linear_value_head_dim:
        raise _computed_otherwise(
            kind, "linear_value_head_dim other than linear_key_head_dim", "both the same"
        )
    if not turns_whole_width(config):
        given = f"mrope_section={rope_of(config).get('mrope_section')}"
        raise _computed_otherwise(kind, given, "sections of all that turns, no wider than a head")
    if getattr(config, "norm_topk_prob", True) is not True:
        raise _computed_otherwise(kind, f"norm_topk_prob={config.norm_topk_prob}", "True")
    if getattr(config, "decoder_sparse_step", 1) != 1 or getattr(config, "mlp_only_layers", None):
        raise _computed_otherwise(kind, "layers without experts", "experts in every layer")


def _describe_recurrent_experts(writer: Any, config: Any) -> None:
    describe_recurrent(writer, config)
    _describe_experts(writer, config)


def _recurrent(architecture: str, describe: Callable[[Any, Any], None] = describe_recurrent) -> GgufFamily:
    return GgufFamily(
        architecture,
        norm_offset=1.0,
        partial_rotary=True,
        in_transformers=False,
        check=_check_recurrent,
        describe=describe,
    )


def _computed_otherwise(kind: str, given: str, built_in: str) -> NotExportable:
    return NotExportable(
        f"llama.cpp computes {kind} models with {built_in}, this one has {given}",
        fix="save_pretrained_merged keeps it",
    )


#: Transformers' model type -> how it is written. Mistral is computed as Llama is.
FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("llama", permutes=True),
    "mistral": GgufFamily("llama", permutes=True, check=_warn_of_window),
    "qwen2": GgufFamily("qwen2", check=_warn_of_window),
    "qwen3": GgufFamily("qwen3", check=_warn_of_window),
    "gemma": GgufFamily("gemma", activation="gelu_tanh", norm_offset=1.0, in_transformers=False),
    "gemma2": GgufFamily(
        "gemma2", activation="gelu_tanh", norm_offset=1.0, check=_check_gemma, describe=_describe_gemma
    ),
    "gemma3_text": GgufFamily(
        "gemma3", activation="gelu_tanh", norm_offset=1.0, check=_check_gemma3, describe=_describe_gemma3
    ),
    "phi3": GgufFamily("phi3", partial_rotary=True, check=_warn_of_window, describe=_describe_phi3),
    "granite": GgufFamily("granite", permutes=True, in_transformers=False, describe=_describe_granite),
    "mixtral": GgufFamily(
        "llama", permutes=True, in_transformers=False, check=_warn_of_window, describe=_describe_experts
    ),
    "qwen2_moe": GgufFamily("qwen2moe", check=_check_experts, describe=_describe_experts),
    "qwen3_moe": GgufFamily("qwen3moe", check=_check_experts, describe=_describe_experts),
    "cohere": GgufFamily("command-r", in_transformers=False, check=_check_cohere, describe=_describe_cohere),
    "cohere2": GgufFamily("cohere2", in_transformers=False, check=_check_cohere2, describe=_describe_cohere),
    "olmo2": GgufFamily("olmo2", in_transformers=False),
    "olmo3": GgufFamily("olmo2", in_transformers=False, check=_check_olmo3, describe=_describe_window),
    "exaone4": GgufFamily("exaone4", in_transformers=False, check=_check_exaone4),
    "smollm3": GgufFamily("smollm3", permutes=True, in_transformers=False, check=_check_smollm3),
    "glm4": GgufFamily("glm4", partial_rotary=True, in_transformers=False),
    "ernie4_5": GgufFamily("ernie4_5", in_transformers=False),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"),
        GgufFamily("deepseek2", in_transformers=False, check=_check_latent, describe=describe_latent),
    ),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl"), GgufFamily("qwen2vl", in_transformers=False, check=_warn_of_window)
    ),
    "qwen3_next": _recurrent("qwen3next", _describe_recurrent_experts),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5"), _recurrent("qwen35")),
    **dict.fromkeys(
        ("qwen3_5_moe_text", "qwen3_5_moe"), _recurrent("qwen35moe", _describe_recurrent_experts)
    ),
    "qwen3_vl": GgufFamily("qwen3vl", in_transformers=False),
    "gemma3": GgufFamily(
        "gemma3",
        activation="gelu_tanh",
        norm_offset=1.0,
        in_transformers=False,
        check=_check_gemma3,
        describe=_describe_gemma3,
    ),
}


def family_of(config: Any) -> GgufFamily:
    """The family of a model's config.

    Raises:
        NotExportable: for a family without one, or settings that llama.cpp would compute otherwise.
    """
    kind = str(getattr(config, "model_type", ""))
    if kind not in FAMILIES:
        raise NotExportable(
            f"models of the type '{kind}' cannot be written as GGUF; {', '.join(FAMILIES)} can",
            fix="save_pretrained_merged, then llama.cpp's own converter",
        )
    family, config = FAMILIES[kind], config.get_text_config()
    name = "hidden_activation" if getattr(config, "hidden_activation", None) else "hidden_act"
    given = getattr(config, name, "silu")
    if ACTIVATIONS.get(given) != family.activation:
        raise _computed_otherwise(kind, f"{name}='{given}'", family.activation)
    family.check(config)
    return family
