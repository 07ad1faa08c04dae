"""A model's rotary embedding as llama.cpp reads it: metadata, and factors that its frequencies are divided by."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pronghorn.errors import NotExportable

#: Llama 3's factors; LongRoPE's for texts within and beyond the context that the model was first trained on.
FACTORS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"


def rope_of(config: Any) -> dict[str, Any]:
    """The RoPE's parameters: of layers with full attention, where kinds of layers differ."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return dict(rope["full_attention"]) if "full_attention" in rope else rope


def rotated(config: Any, head_dim: int) -> int:
    """How much of each head is rotated."""
    return int(head_dim * float(rope_of(config).get("partial_rotary_factor", 1.0)))


def rope_factors(config: Any, head_dim: int) -> dict[str, Tensor]:
    """What llama.cpp divides each frequency by, [rotated / 2] fp32, by tensor name: Llama 3's scaling and LongRoPE have
    such factors, every other kind none."""
    rope = rope_of(config)
    if rope.get("rope_type") == "longrope":
        return {
            name: torch.tensor(rope[key], dtype=torch.float32)
            for name, key in ((LONG, "long_factor"), (SHORT, "short_factor"))
        }
    if rope.get("rope_type") != "llama3":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    plain = float(rope["rope_theta"]) ** -steps
    return {FACTORS: (plain / scaled.double()).float()}


def add_rope(writer: Any, config: Any, architecture: str, head_dim: int, partial_rotary: bool) -> None:
    """Base frequency, scaling and how much of a head is rotated.

    Raises:
        NotExportable: for a RoPE that llama.cpp has no metadata for.
    """
    from gguf import RopeScalingType

    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    size = rotated(config, head_dim)
    if size != head_dim and not partial_rotary:
        raise NotExportable("part of each head is rotated", fix="save_pretrained_merged keeps it")
    writer.add_rope_dimension_count(size)
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32.0))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1.0))
        if architecture != "deepseek2":  # whose attention has a factor of its own
            writer.add_rope_scaling_attn_factors(_yarn_factor(rope))
    elif kind == "longrope" and architecture == "phi3":
        _add_longrope(writer, config, rope)
    elif kind != "default" and not (kind == "llama3" and architecture in ("llama", "granite")):
        raise NotExportable(
            f"llama.cpp has no RoPE scaling of the type '{kind}' for {architecture}",
            fix="save_pretrained_merged keeps it",
        )


def _yarn_factor(rope: dict[str, Any]) -> float:
    """What YaRN multiplies rotated queries and keys by, as a factor of what llama.cpp takes: 1 + 0.1 ln(factor)."""
    usual = 1.0 + 0.1 * math.log(rope["factor"])
    given = rope.get("attention_factor")
    if given is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        ratio = [1.0 + 0.1 * rope[name] * math.log(rope["factor"]) for name in ("mscale", "mscale_all_dim")]
        given = ratio[0] / ratio[1]
    return 1.0 if given is None else float(given) / usual


def _add_longrope(writer: Any, config: Any, rope: dict[str, Any]) -> None:
    from gguf import RopeScalingType
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    _, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=1)
    writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(int(original))
    writer.add_rope_scaling_attn_factors(float(attention_factor))
