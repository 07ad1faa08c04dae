"""Fish-Speech's tensors and the two decoders': which part of which is which.

Its attention rotates neighbouring elements of a head (2i, 2i + 1), Transformers' decoders rotate i with i + D/2. Logits
are the same when the rows of q and k, their biases and the weights of their norms change places alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pronghorn.speech.layout import DualARConfig

_PLAIN = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_MLP = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_SLOW, _FAST = "text_model.model.", "audio_decoder."


@dataclass(frozen=True)
class Part:
    """A tensor of the model as `rows` of a published one; with `heads`, rows that are rotated change places."""

    name: str
    rows: int
    heads: int = 0


def to_halves(tensor: Tensor, heads: int) -> Tensor:
    """Rows [N·D, ...] with the pair (2i, 2i + 1) of each head at (i, i + D/2)."""
    rest = tensor.shape[1:]
    return tensor.reshape(heads, -1, 2, *rest).transpose(1, 2).reshape(-1, *rest)


def to_pairs(tensor: Tensor, heads: int) -> Tensor:
    """`to_halves` undone."""
    rest = tensor.shape[1:]
    return tensor.reshape(heads, 2, -1, *rest).transpose(1, 2).reshape(-1, *rest)


def split(tensor: Tensor, parts: tuple[Part, ...]) -> dict[str, Tensor]:
    """A published tensor as the model's."""
    pieces = tensor.split([part.rows for part in parts])
    return {
        part.name: (to_halves(piece, part.heads) if part.heads else piece).contiguous()
        for part, piece in zip(parts, pieces, strict=True)
    }


def join(parts: tuple[Part, ...], tensors: Mapping[str, Tensor]) -> Tensor:
    """The model's tensors as the published one they are parts of."""
    pieces = [
        to_pairs(tensors[part.name], part.heads) if part.heads else tensors[part.name] for part in parts
    ]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def published_parts(config: DualARConfig) -> dict[str, tuple[Part, ...]]:
    """All tensors of a checkpoint by the names it has them under, each with the model's tensors it consists of."""
    slow, fast = config.slow, config.fast
    found: dict[str, tuple[Part, ...]] = {
        "embeddings.weight": (Part("slow.model.embed_tokens.weight", slow.vocab_size),),
        "codebook_embeddings.weight": (
            Part("codebook_embeddings.weight", config.codebook_size * config.num_codebooks),
        ),
        "norm.weight": (Part("slow.model.norm.weight", slow.hidden_size),),
        "fast_embeddings.weight": (Part("fast.model.embed_tokens.weight", fast.vocab_size),),
        "fast_norm.weight": (Part("fast.model.norm.weight", fast.hidden_size),),
        "fast_output.weight": (Part("fast.lm_head.weight", fast.vocab_size),),
    }
    if not slow.tie_word_embeddings:
        found["output.weight"] = (Part("slow.lm_head.weight", slow.vocab_size),)
    if slow.hidden_size != fast.hidden_size:
        found |= {f"fast_project_in.{n}": (Part(f"fast_project_in.{n}", fast.hidden_size),) for n in _BOTH}
    found |= _layers(slow, "layers", "slow") | _layers(fast, "fast_layers", "fast")
    return {nested_name(name): parts for name, parts in found.items()} if config.nested else found


_BOTH = ("weight", "bias")


def nested_name(name: str) -> str:
    """The nested form's name of a tensor."""
    if name.startswith("codebook_embeddings."):
        return f"{_FAST}{name}"
    return f"{_FAST}{name.removeprefix('fast_')}" if name.startswith("fast_") else f"{_SLOW}{name}"


def _layers(config: Any, published: str, decoder: str) -> dict[str, tuple[Part, ...]]:
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    normed = config.model_type == "qwen3"
    bias = config.model_type == "qwen2" or bool(getattr(config, "attention_bias", False))
    kinds = _BOTH if bias else _BOTH[:1]
    found: dict[str, tuple[Part, ...]] = {}
    for index in range(config.num_hidden_layers):
        theirs, ours = f"{published}.{index}", f"{decoder}.model.layers.{index}"
        attention = f"{ours}.self_attn"
        for kind in kinds:
            found[f"{theirs}.attention.wqkv.{kind}"] = (
                Part(f"{attention}.q_proj.{kind}", heads * size, heads),
                Part(f"{attention}.k_proj.{kind}", kv_heads * size, kv_heads),
                Part(f"{attention}.v_proj.{kind}", kv_heads * size),
            )
            if kind == "weight" or config.model_type != "qwen2":
                found[f"{theirs}.attention.wo.{kind}"] = (
                    Part(f"{attention}.o_proj.{kind}", config.hidden_size),
                )
        if normed:
            for name in ("q_norm", "k_norm"):
                found[f"{theirs}.attention.{name}.weight"] = (Part(f"{attention}.{name}.weight", size, 1),)
        for name, part in _MLP.items():
            rows = config.hidden_size if name == "w2" else config.intermediate_size
            found[f"{theirs}.feed_forward.{name}.weight"] = (Part(f"{ours}.mlp.{part}.weight", rows),)
        for name, part in _PLAIN.items():
            found[f"{theirs}.{name}.weight"] = (Part(f"{ours}.{part}.weight", config.hidden_size),)
    return found
