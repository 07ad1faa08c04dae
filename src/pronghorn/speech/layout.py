"""Fish-Speech's config.json, flat (`dual_ar`) or nested (`fish_qwen3_omni`), as the configs of two stock decoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from pronghorn.errors import CheckpointCorrupt, UnsupportedCheckpoint

FLAT, NESTED = "dual_ar", "fish_qwen3_omni"
MODEL_TYPES = (FLAT, NESTED)

#: sizes of a transformer as the flat form names them; the fast one's begin with "fast_" (`n_fast_layer` apart)
_SIZES = ("n_head", "n_local_heads", "head_dim", "dim", "intermediate_size")
_SWITCHES = ("attention_qkv_bias", "attention_o_bias", "attention_qk_norm")


class DualARConfig(PreTrainedConfig):
    """Sizes of `DualARModel`.

    Args:
        slow, fast: configs of the two decoders, as objects or dictionaries.
        num_codebooks, codebook_size: K codes a frame, each below `codebook_size`.
        semantic_begin_id, semantic_end_id: the tokens of the first codebook's codes, the last one included.
        scale_codebook_embeddings: a frame's embedding, a sum of K + 1, is divided by √(K + 1).
        norm_fastlayer_input: the fast transformer reads the slow one's output behind the final norm, not before it.
        published: config.json as it was read, for `save_speech`. `stored_dtype`: of the checkpoint's tensors.
    """

    model_type = "pronghorn_dual_ar"

    def __init__(
        self,
        slow: Any = None,
        fast: Any = None,
        num_codebooks: int = 1,
        codebook_size: int = 1,
        semantic_begin_id: int = 0,
        semantic_end_id: int = 0,
        scale_codebook_embeddings: bool = False,
        norm_fastlayer_input: bool = False,
        published: Mapping[str, Any] | None = None,
        stored_dtype: str = "float32",
        **kwargs: Any,
    ) -> None:
        self.slow, self.fast = _as_config(slow), _as_config(fast)
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.semantic_begin_id, self.semantic_end_id = semantic_begin_id, semantic_end_id
        self.scale_codebook_embeddings = scale_codebook_embeddings
        self.norm_fastlayer_input = norm_fastlayer_input
        self.published, self.stored_dtype = dict(published or {}), stored_dtype
        # Each decoder ties its own; between the two nothing is tied.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Of the slow transformer."""
        return int(self.slow.num_hidden_layers)

    @property
    def positions(self) -> int:
        """Of the slow transformer."""
        return int(self.slow.max_position_embeddings)

    @property
    def nested(self) -> bool:
        """Whether the checkpoint is in the nested form."""
        return self.published.get("model_type") == NESTED


def _as_config(config: Any) -> Any:
    if isinstance(config, Mapping):
        values = dict(config)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    return LlamaConfig() if config is None else config


def is_dual_ar(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is Fish-Speech's."""
    return config.get("model_type") in MODEL_TYPES


def not_dual_ar(published: Mapping[str, Any], where: str) -> UnsupportedCheckpoint:
    """The error for another model's config.json."""
    return UnsupportedCheckpoint(
        f"model type '{published.get('model_type')}' is not one of {', '.join(MODEL_TYPES)}",
        where=where,
        fix="for a Llama with audio tokens (Orpheus) make rows with `pronghorn speech rows` and train with "
        "`pronghorn train`",
    )


def config_of(published: Mapping[str, Any], semantic: tuple[int, int], where: str = "") -> DualARConfig:
    """The config of a published config.json.

    Args:
        semantic: first and last id of the semantic tokens, as the tokenizer has them.

    Raises:
        CheckpointCorrupt: a size is missing, or no whole number.
        UnsupportedCheckpoint: another model type, or attention that none of Transformers' decoders has.
    """
    if not is_dual_ar(published):
        raise not_dual_ar(published, where)
    flat = _flattened(published) if published["model_type"] == NESTED else dict(published)
    missing = [
        key for key in ("vocab_size", "n_layer", "n_head", "dim") if not isinstance(flat.get(key), int)
    ]
    missing += [key for key in ("codebook_size", "num_codebooks") if not isinstance(flat.get(key), int)]
    if missing:
        raise CheckpointCorrupt(
            f"config.json lacks {', '.join(missing)}", where=where, fix="download the model again"
        )
    slow, fast = _slow_sizes(flat), _fast_sizes(flat)
    return DualARConfig(
        slow=_decoder(slow, where),
        fast=_decoder(fast, where),
        num_codebooks=flat["num_codebooks"],
        codebook_size=flat["codebook_size"],
        semantic_begin_id=semantic[0],
        semantic_end_id=semantic[1],
        scale_codebook_embeddings=bool(flat.get("scale_codebook_embeddings", False)),
        norm_fastlayer_input=bool(flat.get("norm_fastlayer_input", False)),
        published=published,
    )


def _flattened(published: Mapping[str, Any]) -> dict[str, Any]:
    """The nested form's values under the flat form's names. It always scales embeddings and norms the fast input."""
    text, audio = dict(published.get("text_config") or {}), dict(published.get("audio_decoder_config") or {})
    flat = dict(text)
    flat["codebook_size"], flat["num_codebooks"] = audio.get("vocab_size"), audio.get("num_codebooks")
    flat["n_fast_layer"] = audio.get("n_layer")
    flat |= {f"fast_{key}": audio[key] for key in (*_SIZES, *_SWITCHES) if audio.get(key) is not None}
    flat["scale_codebook_embeddings"] = flat["norm_fastlayer_input"] = True
    return flat


@dataclass(frozen=True)
class _Decoder:
    """One transformer's sizes, every one of them settled."""

    vocabulary: int
    layers: int
    positions: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    inner: int
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    rope_base: float
    eps: float
    tied: bool


def _slow_sizes(flat: Mapping[str, Any]) -> _Decoder:
    heads, width = flat["n_head"], flat["dim"]
    kv_heads = flat.get("n_local_heads") or -1
    # Two thirds of 4 · dim, rounded up to a multiple of 256: what a config without the number means.
    inner = flat.get("intermediate_size") or -(-int(8 * width / 3) // 256) * 256
    return _Decoder(
        vocabulary=flat["vocab_size"],
        layers=flat["n_layer"],
        positions=flat.get("max_seq_len") or 2048,
        heads=heads,
        kv_heads=heads if kv_heads == -1 else kv_heads,
        head_dim=flat.get("head_dim") or width // heads,
        width=width,
        inner=inner,
        qkv_bias=bool(flat.get("attention_qkv_bias", False)),
        o_bias=bool(flat.get("attention_o_bias", False)),
        qk_norm=bool(flat.get("attention_qk_norm", False)),
        rope_base=float(flat.get("rope_base") or 10_000),
        eps=float(flat.get("norm_eps") or 1e-5),
        tied=bool(flat.get("tie_word_embeddings", True)),
    )


def _fast_sizes(flat: Mapping[str, Any]) -> _Decoder:
    """The fast transformer's; what it does not say is as in the slow one."""
    slow = _slow_sizes(flat)

    def switch(name: str, default: bool) -> bool:
        value = flat.get(f"fast_{name}")
        return default if value is None else bool(value)

    return _Decoder(
        vocabulary=flat["codebook_size"],
        layers=flat.get("n_fast_layer") or 4,
        positions=flat["num_codebooks"],
        heads=flat.get("fast_n_head") or slow.heads,
        kv_heads=flat.get("fast_n_local_heads") or slow.kv_heads,
        head_dim=flat.get("fast_head_dim") or slow.head_dim,
        width=flat.get("fast_dim") or slow.width,
        inner=flat.get("fast_intermediate_size") or slow.inner,
        qkv_bias=switch("attention_qkv_bias", slow.qkv_bias),
        o_bias=switch("attention_o_bias", slow.o_bias),
        qk_norm=switch("attention_qk_norm", slow.qk_norm),
        rope_base=slow.rope_base,
        eps=slow.eps,
        tied=False,
    )


def _decoder(sizes: _Decoder, where: str) -> PreTrainedConfig:
    """The stock decoder with these pieces: norms of q and k are Qwen3's, biases of q, k, v alone Qwen2's."""
    if sizes.heads % sizes.kv_heads or sizes.head_dim % 2:
        raise CheckpointCorrupt(
            f"{sizes.heads} heads of {sizes.head_dim} cannot share {sizes.kv_heads} of keys and values",
            where=where,
            fix="check config.json",
        )
    values: dict[str, Any] = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "rms_norm_eps": sizes.eps,
        "max_position_embeddings": sizes.positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_base},
        "tie_word_embeddings": sizes.tied,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if sizes.qkv_bias and not sizes.o_bias and not sizes.qk_norm:
        return Qwen2Config(**values)
    if sizes.qkv_bias != sizes.o_bias:
        raise UnsupportedCheckpoint(
            f"attention with biases on {'q, k, v' if sizes.qkv_bias else 'o'} alone and "
            f"{'' if sizes.qk_norm else 'no '}norms of q and k is that of no decoder here",
            where=where,
            fix="no published checkpoint has it: check config.json",
        )
    return (Qwen3Config if sizes.qk_norm else LlamaConfig)(**values, attention_bias=sizes.qkv_bias)
