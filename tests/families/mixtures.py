"""Shared by the tests of mixtures of experts: tiny random models of the real classes, experts adapted too."""

from __future__ import annotations

from typing import Any

from tests.families.parity import add_adapter
from tests.tiny import tiny_model

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
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
}

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def tiny_mixture(family: str, **options: Any) -> Any:
    """A random model; the experts run one by one, as the formulas say."""
    model = tiny_model(family, **{**MIXTURES[family], **options})
    model.config._experts_implementation = "eager"
    if family == "gpt_oss":
        model.config._attn_implementation = "eager"
    return model


def add_expert_adapter(model: Any, **options: Any) -> Any:
    """A PEFT LoRA on attention and experts, every tensor of it non-zero."""
    return add_adapter(model, **{"target_modules": ATTENTION, "target_parameters": STACKS} | options)
