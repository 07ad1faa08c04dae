"""How a model family is described: which submodule plays which part, and the few numbers that differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerParts:
    """Paths inside a decoder layer. A part that a family lacks is None."""

    input_norm: str = "input_layernorm"
    attention: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    q_norm: str | None = None
    k_norm: str | None = None
    post_attention_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


def no_window(config: Any, layer_index: int) -> int | None:
    """Full causal attention in every layer."""
    return None


def no_restriction(config: Any) -> str | None:
    """Every config of the family takes the fast path."""
    return None


@dataclass(frozen=True)
class DecoderFamily:
    """A pre-norm decoder with rotary attention and a gated MLP.

    Args:
        name: shown by `describe()`.
        model_types: `config.model_type` values it covers.
        prefix: Transformers' class prefix; the classes that the fast path was reviewed for are
            `{prefix}ForCausalLM`, `{prefix}Model`, `{prefix}DecoderLayer`, `{prefix}Attention`, `{prefix}MLP`,
            `{prefix}RMSNorm` and `{prefix}RotaryEmbedding`.
        parts: where things are in a layer.
        window: sliding window in tokens of a layer, None for full attention.
        norm_offset: 1.0 where norms multiply by (1 + weight).
        unsupported: a reason why a config of this family cannot take the fast path, or None.
    """

    name: str
    model_types: tuple[str, ...]
    prefix: str
    parts: LayerParts = field(default_factory=LayerParts)
    window: Callable[[Any, int], int | None] = no_window
    norm_offset: float = 0.0
    unsupported: Callable[[Any], str | None] = no_restriction


#: `config.hidden_act` -> the activation's name in `kernels.glu`
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
