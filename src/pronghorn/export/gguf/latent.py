"""Latent attention in GGUF. llama.cpp keeps the codes of keys and values in its cache and multiplies queries and
outputs by what makes heads of them, so that `kv_b_proj` stands in two parts, keys' part turned:

    k_b [N, R, E],   v_b [N, F, R]        of kv_b [N · (E + F), R]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pronghorn.export.gguf.rope import rope_of

#: the end of the tensor's name, and of those of its parts
KV_B, KV_B_PARTS = "kv_b_proj.weight", ("k_b_proj.weight", "v_b_proj.weight")


def is_latent(config: Any) -> bool:
    return getattr(config, "kv_lora_rank", None) is not None


def split_kv_b(tensor: Tensor, config: Any) -> list[Tensor]:
    """kv_b [N · (E + F), R] in the two parts."""
    by_head = tensor.view(config.num_attention_heads, -1, tensor.shape[-1])
    keys, values = by_head.split((config.qk_nope_head_dim, config.v_head_dim), 1)
    return [keys.transpose(1, 2).contiguous(), values.contiguous()]


def join_kv_b(parts: list[Tensor]) -> Tensor:
    """The way back."""
    keys, values = parts
    return torch.cat([keys.transpose(1, 2), values], 1).flatten(0, 1)


def kv_b_shapes(config: Any) -> list[tuple[int, ...]]:
    """Of the two parts."""
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    return [(heads, rank, config.qk_nope_head_dim), (heads, config.v_head_dim, rank)]


def describe_latent(writer: Any, config: Any) -> None:
    """Sizes of codes and heads, how experts are chosen, and YaRN's factor of the logits."""
    from gguf import ExpertGatingFuncType

    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(int(config.q_lora_rank))
    writer.add_kv_lora_rank(int(config.kv_lora_rank))
    writer.add_key_length_mla(int(config.qk_nope_head_dim + config.qk_rope_head_dim))
    writer.add_value_length_mla(int(config.v_head_dim))
    rope = rope_of(config)
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_yarn_log_mul(0.1 * float(rope.get("mscale_all_dim") or 0.0))
    writer.add_leading_dense_block_count(leading_dense_layers(config))
    experts = getattr(config, "n_routed_experts", None)
    if experts is None:  # llama.cpp wants these all the same
        writer.add_expert_feed_forward_length(int(config.intermediate_size))
        writer.add_expert_shared_count(0)
        writer.add_expert_weights_scale(1.0)
        return
    sigmoid = config.model_type != "deepseek_v2"
    writer.add_expert_count(int(experts))
    writer.add_expert_used_count(int(config.num_experts_per_tok))
    writer.add_expert_feed_forward_length(int(config.moe_intermediate_size))
    writer.add_expert_shared_count(int(config.n_shared_experts))
    writer.add_expert_weights_scale(float(config.routed_scaling_factor))
    # Transformers' V2 leaves the weights as they are, whatever norm_topk_prob says.
    writer.add_expert_weights_norm(bool(config.norm_topk_prob) if sigmoid else False)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID if sigmoid else ExpertGatingFuncType.SOFTMAX)
    if sigmoid and config.n_group > 1:
        writer.add_expert_group_count(int(config.n_group))
        writer.add_expert_group_used_count(int(config.topk_group))


def leading_dense_layers(config: Any) -> int:
    """How many of the first layers have no experts."""
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds is not None:
        return next((i for i, kind in enumerate(kinds) if kind == "sparse"), len(kinds))
    first = getattr(config, "first_k_dense_replace", None)
    return int(config.num_hidden_layers if first is None else first)
