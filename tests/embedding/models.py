"""Tiny embedding models of real classes with adapters that are not zero, and what stock Transformers gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from pronghorn.embedding import FastEmbeddingModel
from tests.tiny import save_tiny, tiny_tokenizer

ENCODERS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "bert": (BertConfig, BertModel, {"type_vocab_size": 2}),
    "roberta": (RobertaConfig, RobertaModel, {"type_vocab_size": 1}),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel, {"type_vocab_size": 1}),
    "modernbert": (
        ModernBertConfig,
        ModernBertModel,
        {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
}
TEXTS = [
    "a",
    "The pronghorn is the fastest land animal of North America.",
    "What does it eat? Grass.",
    "x y z " * 9,
]


def save_embedder(path: Path, kind: str, **config: Any) -> Path:
    """A checkpoint of a tiny decoder (of `tests.tiny.FAMILIES`) or encoder, with its tokenizer."""
    if kind not in ENCODERS:
        return save_tiny(path, kind, **config)
    config_class, model_class, extra = ENCODERS[kind]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"vocab_size": 320, "max_position_embeddings": 80, "pad_token_id": 0}
    if kind != "modernbert":
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config_class(**{**sizes, **extra, **config}))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.1)
    model.save_pretrained(path)
    tiny_tokenizer(chat_template=False).save_pretrained(path)
    return path


def embedder(path: Path, kind: str, *, lora_dropout: float = 0.0, **loading: Any) -> Any:
    """A loaded model in fp32 with an adapter whose B is not zero."""
    model, _ = FastEmbeddingModel.from_pretrained(save_embedder(path, kind), dtype="float32", **loading)
    model = FastEmbeddingModel.get_peft_model(model, r=4, lora_dropout=lora_dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def stock_copy(model: Any) -> Any:
    """The same PEFT model in fp64 on its stock forward."""
    twin = copy.deepcopy(model).double()
    binding = getattr(twin.get_base_model(), "pronghorn_binding", None)
    if binding is not None and binding.bound:
        binding.undo()
    return twin


def stock_vectors(model: Any, texts: list[list[int]], pooling: str, padding_side: str) -> Tensor:
    """Vectors [n, H] of a stock model, of rows padded on either side, pooled as the definition says."""
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        at = slice(0, len(text)) if padding_side == "right" else slice(longest - len(text), longest)
        ids[row, at], mask[row, at] = torch.tensor(text), 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if padding_side == "left":
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    hidden = model(**inputs).last_hidden_state
    rows = [hidden[row][mask[row].bool()] for row in range(len(texts))]
    pick = {"mean": lambda h: h.mean(0), "cls": lambda h: h[0], "last": lambda h: h[-1]}[pooling]
    return torch.stack([pick(row) for row in rows])
