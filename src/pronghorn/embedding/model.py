"""`FastEmbeddingModel`: a decoder or an encoder as an embedding model, an adapter on it, texts as vectors.

What is returned is the stock Transformers or PEFT model. How its vectors are made is an attribute of this instance, and
so are `encode` and what saves it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pronghorn.embedding.layout import Layout, Pooling, check_pooling, model_folder, read_layout
from pronghorn.embedding.saving import save_adapter_folder, save_merged_folder
from pronghorn.embedding.tokens import end_with_token, tokenize
from pronghorn.embedding.vectors import Batcher, encode_tokens, shortened, width_of
from pronghorn.engine import base_causal_lm
from pronghorn.errors import AdapterMismatch, UnknownArgument
from pronghorn.hardware import probe
from pronghorn.kernels.attention import check_name
from pronghorn.loading.arguments import (
    NO_EFFECT_ON_LOADING,
    note_without_effect,
    refuse_no_length,
    refuse_unknown,
)
from pronghorn.loading.choices import AskedInt8, AskedStorage, choose_options
from pronghorn.loading.fast import FastLanguageModel, bind_with, load_named, on_disk, save_level
from pronghorn.loading.precision import choose_dtype
from pronghorn.loading.source import ADAPTER_CONFIG, Source, base_of_adapter, locate, read_json

logger = logging.getLogger("pronghorn")

#: Positions of a batch of `encode`, padding included.
BATCH_TOKENS = 16384


@dataclass(frozen=True)
class Embedder:
    """What a model needs besides itself to make vectors; `layout.pooling` is settled."""

    layout: Layout
    tokenizer: Any
    use_gradient_checkpointing: bool | str = False

    @property
    def pooling(self) -> Pooling:
        assert self.layout.pooling is not None
        return self.layout.pooling


def embedder_of(model: Any) -> Embedder:
    """What `FastEmbeddingModel` left on a model.

    Raises:
        UnknownArgument: the model was not loaded by it.
    """
    found: Embedder | None = base_causal_lm(model).__dict__.get("pronghorn_embedder")
    if found is None:
        raise UnknownArgument(
            f"this {type(base_causal_lm(model)).__name__} is no embedding model",
            fix="load it with FastEmbeddingModel.from_pretrained",
        )
    return found


class FastEmbeddingModel:
    """Embedding models with the argument names of `FastLanguageModel`. All methods are static."""

    @staticmethod
    def from_pretrained(
        model_name: str | os.PathLike[str],
        max_seq_length: int | None = None,
        pooling: str = "auto",
        normalize: bool | None = None,
        dtype: str | torch.dtype | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        load_in_int8: bool = False,
        full_finetuning: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        device_map: Any = None,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: bool | str = False,
        attn_implementation: str | None = None,
        attention: str | None = None,
        strict: bool = False,
        gguf_file: str | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Load a decoder (on the fast path where its family has one) or an encoder of BERT's kind, and its tokenizer.

        Args:
            model_name: a hub id, a folder (sentence-transformers' layout is read where it is there), a .gguf file, or a
                folder with an adapter.
            max_seq_length: texts are cut to this many tokens; None takes what the folder says, else the model's limit.
            pooling: "mean", "cls" or "last"; "auto" takes what the folder says, else the last token's vector of a
                decoder and the mean of an encoder.
            normalize: vectors of length one; None takes what the folder says, else True.
            use_gradient_checkpointing: False keeps all that backward needs; `EmbeddingConfig.gradient_cache_texts`
                bounds it for any batch.

        The other arguments are those of `FastLanguageModel.from_pretrained`.

        Returns:
            (model, tokenizer); the model has no head, is in evaluation mode and has `encode(texts)`.

        Raises:
            PronghornError: a subclass for everything that can be wrong with a name, a file or an argument.
        """
        refuse_unknown(kwargs, FastEmbeddingModel.from_pretrained, NO_EFFECT_ON_LOADING)
        note_without_effect(kwargs, "from_pretrained")
        refuse_no_length(max_seq_length, "max_seq_length")
        chosen_pooling = check_pooling(pooling)
        save_level(use_gradient_checkpointing)
        check_name(attention)
        hardware = probe()
        chosen = choose_dtype(dtype, hardware)
        storage = AskedStorage(load_in_4bit, load_in_8bit, full_finetuning)
        options = replace(
            choose_options(chosen.value, storage, hardware, AskedInt8(load_in_int8)),
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            headless=True,
        )
        named, layout = _with_layout(
            model_name, gguf_file, revision, token, trust_remote_code, chosen_pooling
        )
        logger.info("pronghorn: %s in %s", named.name, chosen)
        wanted = max_seq_length or layout.max_seq_length
        model, tokenizer = load_named(
            named, options, token=token, max_seq_length=wanted, full_finetuning=full_finetuning
        )
        bind_with(model, use_gradient_checkpointing, strict, attention)
        layout = _settle_layout(layout, base_causal_lm(model), tokenizer, chosen_pooling, normalize, wanted)
        embedder = Embedder(layout, tokenizer, use_gradient_checkpointing)
        base_causal_lm(model).__dict__["pronghorn_embedder"] = embedder
        add_methods(model)
        return model, tokenizer

    @staticmethod
    def get_peft_model(model: Any, r: int = 16, **settings: Any) -> Any:
        """Put a new LoRA adapter on an embedding model; only it is trained. For the arguments see
        `FastLanguageModel.get_peft_model`; an encoder's adapter is put on all its linear layers by default."""
        loaded = embedder_of(model)
        settings.setdefault("task_type", "FEATURE_EXTRACTION")
        settings.setdefault("use_gradient_checkpointing", loaded.use_gradient_checkpointing)
        wrapped = FastLanguageModel.get_peft_model(model, r=r, **settings)
        add_methods(wrapped)
        return wrapped


def encode(
    model: Any,
    texts: str | Sequence[str],
    *,
    prompt_name: str | None = None,
    prompt: str | None = None,
    dim: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    convert_to_tensor: bool = False,
) -> Any:
    """Texts as vectors, in their order.

    Args:
        prompt_name: of one of the model's prompts, which is put in front of every text; None: its default one, if any.
        prompt: a text to put in front instead.
        dim: keep the first elements of each vector, for models that were trained so (Matryoshka).
        batch_tokens: positions that the model sees at a time.

    Returns:
        fp32 [n, H] as an array, or as a tensor on the model's device; [H] for a single text.

    Raises:
        UnknownArgument: there is no such prompt, or a vector has no `dim` elements.
        RowInvalid: a text has no tokens.
    """
    found = embedder_of(model)
    if dim is not None and not 1 <= dim <= width_of(model):
        raise UnknownArgument(
            f"dim={dim} is no length of these vectors", fix=f"use 1 to {width_of(model)}, or leave it out"
        )
    given = [texts] if isinstance(texts, str) else list(texts)
    front = found.layout.prompt(prompt_name) if prompt is None else prompt
    if not given:
        vectors = torch.zeros(0, dim or width_of(model))
    else:
        ids = tokenize(found.tokenizer, [front + text for text in given], found.layout.max_seq_length)
        # An array may hold more vectors than the GPU.
        place = None if convert_to_tensor else torch.device("cpu")
        vectors = vectors_of(model, ids, batch_tokens, place)
        vectors = shortened(vectors, dim, found.layout.normalize)
    vectors = vectors[0] if isinstance(texts, str) else vectors
    return vectors if convert_to_tensor else vectors.float().cpu().numpy()


def vectors_of(
    model: Any,
    texts: Sequence[np.ndarray],
    batch_tokens: int = BATCH_TOKENS,
    place: torch.device | None = None,
) -> Tensor:
    """Vectors [n, H] of texts that are tokens already, not normalised; see `encode_tokens`."""
    found = embedder_of(model)
    batcher = Batcher(model, found.tokenizer.pad_token_id)
    return encode_tokens(model, texts, batcher, found.pooling, batch_tokens, place)


def add_methods(model: Any) -> None:
    """`model.encode(texts)` and `model.save_pretrained_merged(folder)`, partials of module-level functions, which
    survive deepcopy and pickle; `model.save_embedding_adapter(folder)` where there is an adapter."""
    model.__dict__["encode"] = partial(encode, model)
    model.__dict__["save_pretrained_merged"] = partial(save_pretrained_merged, model)
    if hasattr(model, "peft_config"):
        model.__dict__["save_embedding_adapter"] = partial(save_embedding_adapter, model)


def save_pretrained_merged(model: Any, folder: str | os.PathLike[str], *, verify: bool = True) -> Path:
    """The whole model with its adapter merged in, as sentence-transformers and stock Transformers load it; see
    `pronghorn.embedding.saving.save_merged_folder`."""
    found = embedder_of(model)
    return save_merged_folder(model, found.tokenizer, found.layout, folder, verify=verify)


def save_embedding_adapter(model: Any, folder: str | os.PathLike[str]) -> Path:
    """The adapter as a stock PEFT folder, with the layout's files; `from_pretrained` loads it with its base."""
    found = embedder_of(model)
    return save_adapter_folder(model, found.tokenizer, found.layout, folder)


def _with_layout(
    model_name: str | os.PathLike[str],
    gguf_file: str | None,
    revision: str | None,
    token: str | bool | None,
    trust_remote_code: bool,
    pooling: Pooling | None,
) -> tuple[Source, Layout]:
    """Where the checkpoint or adapter lies, and the layout that stands beside it, or beside an adapter's base."""
    folder = Path(os.fspath(model_name)).expanduser()
    inner = model_folder(folder)
    if inner != folder:  # older layouts keep the checkpoint in a folder of its own
        return locate(inner), read_layout(folder, pooling) or Layout()
    named = locate(model_name, gguf_file=gguf_file, revision=revision)
    here = on_disk(named, token, trust_remote_code)
    layout = None if here.gguf_file else read_layout(here.path, pooling)
    if here.kind == "adapter":
        if read_json(here.path / ADAPTER_CONFIG).get("task_type") == "CAUSAL_LM":
            raise AdapterMismatch(
                "the adapter was trained on a language model, whose modules have other names",
                where=str(here.path / ADAPTER_CONFIG),
                fix="merge it first (pronghorn export --to merged_16bit) and load that folder",
            )
        if layout is None:
            base = on_disk(base_of_adapter(here), token, trust_remote_code)
            layout = None if base.gguf_file else read_layout(base.path, pooling)
    return named, layout or Layout()


def _settle_layout(
    found: Layout,
    base: Any,
    tokenizer: Any,
    pooling: Pooling | None,
    normalize: bool | None,
    wanted: int | None,
) -> Layout:
    """What the folder says, less what was asked for, and the rest as it is usual for the model; the longest text is
    left on the model, and a tokenizer for the last token's vector ends texts with a token of its own."""
    base.max_seq_length = _longest(base, tokenizer, wanted)
    layout = replace(
        found,
        pooling=pooling or found.pooling or _usual_pooling(base.config),
        normalize=found.normalize if normalize is None else normalize,
        max_seq_length=base.max_seq_length,
    )
    if layout.pooling == "last":
        end_with_token(tokenizer)
    return layout


def _usual_pooling(config: Any) -> Pooling:
    """The last token's vector where tokens see only what is before them, else the mean."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    sees_all = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "mean" if sees_all or getattr(config, "use_bidirectional_attention", None) else "last"


def _longest(base: Any, tokenizer: Any, asked: int | None) -> int | None:
    """Tokens of the longest text: as asked for, else what the tokenizer says; within the table of positions, if any."""
    longest: int | None = base.max_seq_length
    if asked is None and tokenizer.model_max_length < 1 << 24:  # a tokenizer without a limit says 10^30
        longest = min(longest or tokenizer.model_max_length, tokenizer.model_max_length)
    for module in base.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding):
            # RoBERTa counts positions from behind its padding's.
            places = table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
            longest = min(longest or places, places)
    return longest
