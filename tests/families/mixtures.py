"""Shared by the tests of mixtures of experts: tiny random models of the real classes, experts adapted too."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.parity import add_adapter
from tests.tiny import tiny_model

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.9,
    "original_max_position_embeddings": 6,
}

#: name -> configuration beyond tests.tiny's: what makes each family different is switched on
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 6,
    },
    "qwen2_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "sliding_window": 5,
        # Low enough to cut many of these models' gates and ups.
        "swiglu_limit": 0.5,
    },
    # Groups of experts, a layer without, YaRN with a factor of the logits, a code for q.
    "deepseek_v2": {
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "topk_method": "group_limited_greedy",
        "n_group": 3,
        "topk_group": 2,
        "routed_scaling_factor": 1.7,
        "rope_parameters": YARN,
    },
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "n_group": 4,
        "topk_group": 2,
        "rope_parameters": YARN,
    },
    "glm4_moe_lite": {
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "mlp_layer_types": ["sparse", "dense"],
    },
    "qwen3_next": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "qwen3_5_moe_text": {
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
}

ATTENTION = [
    "q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "in_proj_qkvz", "in_proj_ba", "out_proj",
]  # fmt: skip
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def tiny_mixture(family: str, **options: Any) -> Any:
    """A random model; the experts run one by one, as the formulas say."""
    model = tiny_model(family, **{**MIXTURES[family], **options})
    model.config._experts_implementation = "eager"
    if family == "gpt_oss":
        model.config._attn_implementation = "eager"
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            # Strong enough to change who is taken.
            buffer.copy_(torch.linspace(-0.5, 0.5, buffer.numel()).roll(2))
    return model


def add_expert_adapter(model: Any, **options: Any) -> Any:
    """A PEFT LoRA on attention and experts, every tensor of it non-zero."""
    return add_adapter(model, **{"target_modules": ATTENTION, "target_parameters": STACKS} | options)
