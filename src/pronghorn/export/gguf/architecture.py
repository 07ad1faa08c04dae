"""What a model of a trained family is in GGUF: names, sizes, RoPE, and the order of the rows of q and k."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pronghorn.errors import NotExportable
from pronghorn.export.safetensors_file import Entry

logger = logging.getLogger("pronghorn")

#: Transformers' model type -> llama.cpp's architecture. Mistral is computed as Llama is.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Dialect:
    """How one model is written down in GGUF."""

    architecture: str
    config: Any

    @property
    def heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.heads)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads)

    @property
    def permutes(self) -> bool:
        """llama.cpp's Llama rotates neighbouring pairs, Transformers' the two halves of a head."""
        return self.architecture == "llama"


def dialect_of(config: Any) -> Dialect:
    """The dialect of a model's config.

    Raises:
        NotExportable: for a family without one, or settings that llama.cpp would compute otherwise.
    """
    kind = str(getattr(config, "model_type", ""))
    if kind not in ARCHITECTURES:
        raise NotExportable(
            f"models of the type '{kind}' cannot be written as GGUF; {', '.join(ARCHITECTURES)} can",
            fix="save_pretrained_merged, then llama.cpp's own converter",
        )
    if getattr(config, "hidden_act", "silu") != "silu":
        raise NotExportable(
            f"llama.cpp computes {kind} models with silu, this one has hidden_act='{config.hidden_act}'",
            fix="save_pretrained_merged keeps it",
        )
    window = getattr(config, "sliding_window", None)
    used = window and getattr(config, "use_sliding_window", True)
    if used and window < config.max_position_embeddings:
        logger.warning(
            "pronghorn: llama.cpp has no sliding window for %s models: beyond %d tokens its answers differ",
            kind,
            window,
        )
    return Dialect(ARCHITECTURES[kind], config)


def gguf_entries(dialect: Dialect, entries: Sequence[Entry]) -> list[Entry]:
    """A merged checkpoint's tensors under GGUF's names, rows in llama.cpp's order, in fp32.

    Raises:
        NotExportable: for a tensor that has no place.
    """
    names = _names(dialect.architecture, int(dialect.config.num_hidden_layers))
    found = [_factors_entry(factors)] if (factors := rope_factors(dialect)) is not None else []
    for entry in entries:
        name = names.get_name(entry.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise NotExportable(
                f"the tensor {entry.name} has no place in a GGUF file of {dialect.architecture}",
                fix="save_pretrained_merged keeps it",
            )
        found.append(Entry(name, entry.shape, torch.float32, _reordered(dialect, entry)))
    return found


@lru_cache(maxsize=4)
def _names(architecture: str, layers: int) -> Any:
    """gguf's own table of names, which takes a while to make."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(arch, layers)


def _reordered(dialect: Dialect, entry: Entry) -> Callable[[], Tensor]:
    part = entry.name.split(".")[-2] if "." in entry.name else ""
    heads = {"q_proj": dialect.heads, "k_proj": dialect.kv_heads}.get(part) if dialect.permutes else None
    if heads is None:
        return entry.make
    return lambda: interleave(entry.make(), heads)


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k [N·D, ...] from halves (i, i + D/2) to neighbours (2i, 2i + 1) in each head."""
    rows = tensor.shape[0]
    split = tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)


def _factors_entry(factors: Tensor) -> Entry:
    return Entry(ROPE_FACTORS, tuple(factors.shape), torch.float32, lambda: factors)


def rope_factors(dialect: Dialect) -> Tensor | None:
    """What llama.cpp divides each frequency by, [D/2] fp32: Llama 3's scaling, None for every other kind."""
    rope = _rope(dialect.config)
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](dialect.config, torch.device("cpu"))
    steps = torch.arange(0, dialect.head_dim, 2, dtype=torch.float64) / dialect.head_dim
    plain = float(rope["rope_theta"]) ** -steps
    return (plain / scaled.double()).float()


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def add_architecture(writer: Any, dialect: Dialect, vocabulary: int) -> None:
    """Sizes and RoPE, as llama.cpp reads them.

    Raises:
        NotExportable: for a RoPE that llama.cpp has no metadata for.
    """
    config = dialect.config
    writer.add_block_count(int(config.num_hidden_layers))
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(dialect.heads)
    writer.add_head_count_kv(dialect.kv_heads)
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(vocabulary)
    writer.add_rope_dimension_count(dialect.head_dim)
    writer.add_key_length(dialect.head_dim)
    writer.add_value_length(dialect.head_dim)
    _add_rope(writer, dialect)


def _add_rope(writer: Any, dialect: Dialect) -> None:
    from gguf import RopeScalingType

    rope = _rope(dialect.config)
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise NotExportable("part of each head is rotated", fix="save_pretrained_merged keeps it")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        original = rope.get("original_max_position_embeddings") or dialect.config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(original))
    elif kind not in ("default", "llama3") or (kind == "llama3" and dialect.architecture != "llama"):
        raise NotExportable(
            f"llama.cpp has no RoPE scaling of the type '{kind}' for {dialect.architecture}",
            fix="save_pretrained_merged keeps it",
        )
