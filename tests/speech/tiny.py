"""Tiny random checkpoints of Fish-Speech in the layout it is published in, and rows for them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.tiny import tiny_tokenizer

CODES, BOOKS = 24, 4

#: as openaudio-s1-mini: norms of q and k in the slow transformer, none in the fast one, of another width
FLAT: dict[str, Any] = {
    "model_type": "dual_ar",
    "vocab_size": 384,
    "n_layer": 2,
    "n_head": 4,
    "n_local_heads": 2,
    "head_dim": 16,
    "dim": 64,
    "intermediate_size": 96,
    "rope_base": 10000,
    "norm_eps": 1e-6,
    "max_seq_len": 256,
    "tie_word_embeddings": True,
    "attention_qk_norm": True,
    "codebook_size": CODES,
    "num_codebooks": BOOKS,
    "scale_codebook_embeddings": True,
    "n_fast_layer": 2,
    "fast_dim": 48,
    "fast_n_head": 3,
    "fast_n_local_heads": 1,
    "fast_head_dim": 16,
    "fast_intermediate_size": 64,
    "fast_attention_qk_norm": False,
}
#: as Fish-Speech 1.5: no norms, one width, a head of its own, nothing scaled
OLDER = {
    key: value
    for key, value in FLAT.items()
    if not key.startswith("fast_") and key != "scale_codebook_embeddings"
} | {"tie_word_embeddings": False, "attention_qk_norm": False}
#: biases of q, k, v
BIASED = FLAT | {"attention_qkv_bias": True, "attention_qk_norm": False, "fast_attention_qkv_bias": False}
#: as S2: the nested form, the fast transformer reads behind the norm
NESTED: dict[str, Any] = {
    "model_type": "fish_qwen3_omni",
    "text_config": {
        key: FLAT[key]
        for key in (
            "vocab_size", "n_layer", "n_head", "n_local_heads", "head_dim", "dim", "intermediate_size", "rope_base",
            "norm_eps", "max_seq_len", "tie_word_embeddings", "attention_qk_norm",
        )
    },
    "audio_decoder_config": {
        "vocab_size": CODES, "num_codebooks": BOOKS, "n_layer": 2, "dim": 64, "n_head": 4, "n_local_heads": 2,
        "head_dim": 16, "intermediate_size": 64, "attention_qk_norm": False,
    },
}  # fmt: skip

LAYOUTS = {"flat": FLAT, "older": OLDER, "biased": BIASED, "nested": NESTED}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, written down from the published model: not by what reads it."""
    flat, nested = config, config["model_type"] == "fish_qwen3_omni"
    if nested:
        flat = config["text_config"] | {
            f"fast_{k}": v
            for k, v in config["audio_decoder_config"].items()
            if k not in ("vocab_size", "n_layer")
        }
        flat |= {"n_fast_layer": 2, "codebook_size": CODES, "num_codebooks": BOOKS}
    dim, fast = flat["dim"], flat.get("fast_dim", flat["dim"])
    found: dict[str, tuple[int, ...]] = {
        "embeddings.weight": (flat["vocab_size"], dim),
        "codebook_embeddings.weight": (CODES * BOOKS, dim),
        "norm.weight": (dim,),
        "fast_embeddings.weight": (CODES, fast),
        "fast_norm.weight": (fast,),
        "fast_output.weight": (CODES, fast),
    }
    if not flat["tie_word_embeddings"]:
        found["output.weight"] = (flat["vocab_size"], dim)
    if fast != dim:
        found |= {"fast_project_in.weight": (fast, dim), "fast_project_in.bias": (fast,)}
    for name, count, prefix in (
        ("layers", flat["n_layer"], ""),
        ("fast_layers", flat["n_fast_layer"], "fast_"),
    ):
        heads, kv, size, width, inner = (
            flat.get(f"{prefix}{key}", flat.get(key))
            for key in ("n_head", "n_local_heads", "head_dim", "dim", "intermediate_size")
        )
        normed, biased = (
            flat.get(f"{prefix}{key}", flat.get(key, False))
            for key in ("attention_qk_norm", "attention_qkv_bias")
        )
        for i in range(count):
            layer = f"{name}.{i}"
            found |= {
                f"{layer}.attention.wqkv.weight": ((heads + 2 * kv) * size, width),
                f"{layer}.attention.wo.weight": (width, heads * size),
                f"{layer}.feed_forward.w1.weight": (inner, width),
                f"{layer}.feed_forward.w3.weight": (inner, width),
                f"{layer}.feed_forward.w2.weight": (width, inner),
                f"{layer}.attention_norm.weight": (width,),
                f"{layer}.ffn_norm.weight": (width,),
            }
            if normed:
                found |= {f"{layer}.attention.{n}.weight": (size,) for n in ("q_norm", "k_norm")}
            if biased:
                found[f"{layer}.attention.wqkv.bias"] = ((heads + 2 * kv) * size,)
    return {_nested(name): shape for name, shape in found.items()} if nested else found


def _nested(name: str) -> str:
    if name.startswith("codebook_"):
        return f"audio_decoder.{name}"
    return f"audio_decoder.{name[5:]}" if name.startswith("fast_") else f"text_model.model.{name}"


def random_tensors(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights that are large enough for a wrong formula to show."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in shapes(config).items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        made[name] = (1 + values / 4 if name.endswith("norm.weight") else values * 0.12).to(dtype)
    return made


def speech_tokenizer() -> Any:
    """The tiny tokenizer with `<|voice|>` and one semantic token a code."""
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|voice|>", *semantic_tokens()]}
    )
    return tokenizer


def semantic_tokens() -> list[str]:
    return [f"<|semantic:{i}|>" for i in range(CODES)]


def save_speech_tiny(
    folder: Path, layout: str = "flat", dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """A published folder: config.json, model.safetensors and a Hugging Face tokenizer."""
    published = LAYOUTS[layout] | config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published))
    save_file(random_tensors(published, dtype), folder / "model.safetensors")
    speech_tokenizer().save_pretrained(folder)
    return folder


def save_tiktoken(folder: Path) -> None:
    """The vocabulary of single bytes and a few merged ones, as tiktoken files."""
    words = [b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor", b"ld", b" world", b"\xc3\xa4"]
    tokens = [bytes([i]) for i in range(256)] + words
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (folder / "tokenizer.tiktoken").write_text("\n".join(lines) + "\n")
    special = ["<|begin_of_text|>", "<|im_start|>", "<|im_end|>", "<|voice|>", *semantic_tokens()]
    (folder / "special_tokens.json").write_text(
        json.dumps({token: len(tokens) + i for i, token in enumerate(special)})
    )


def random_codes(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CODES, (BOOKS, frames))


def write_rows(path: Path, count: int = 4) -> Path:
    """A JSONL file of texts and codes."""
    rows = [
        {"text": f"Row {i} says this.", "codes": random_codes(3 + i, seed=i).tolist()} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
