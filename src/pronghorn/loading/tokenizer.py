"""The tokenizer of a model: loaded, and given a padding token where it has none of its own."""

from __future__ import annotations

import logging
import re
from importlib.util import find_spec
from typing import Any

from pronghorn.data.vision import share_template
from pronghorn.errors import PackageMissing, TokenizerProblem
from pronghorn.loading.source import Source

logger = logging.getLogger("pronghorn")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)

_PAD_NAMES = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<PAD>",
    "<|padding|>",
    "<|vision_pad|>",
)
_SPARE = re.compile(r"reserved|unused|_pad|pad_|extra_id|placeholder", re.IGNORECASE)


def has_tokenizer(source: Source) -> bool:
    """Whether a local source brings a tokenizer of its own; a GGUF file always does."""
    return source.gguf_file is not None or any((source.path / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The fast tokenizer in a local folder or GGUF file.

    Raises:
        TokenizerProblem: when there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(source):
        raise TokenizerProblem(
            "the folder has no tokenizer (no tokenizer.json, tokenizer.model or vocab.json)",
            where=source.location,
            fix="copy the tokenizer files of the original model into it",
        )
    extra = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        return AutoTokenizer.from_pretrained(source.location, trust_remote_code=trust_remote_code, **extra)
    except Exception as error:  # tokenizers raises bare Exception for a damaged tokenizer.json
        raise TokenizerProblem(
            f"the tokenizer cannot be read: {error}",
            where=source.name,
            fix="download or save the model again",
        ) from error


def has_processor(source: Source) -> bool:
    """Whether a local source says how images are made ready for the model."""
    return any(
        (source.path / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")
    )


def load_processor(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The processor in a local folder: tokenizer and image processor in one.

    Raises:
        TokenizerProblem: when there is none, or it cannot be read.
        PackageMissing: for a package that it needs.
    """
    from transformers import AutoProcessor

    if not has_processor(source):
        raise TokenizerProblem(
            "the folder has no image processor (no processor_config.json or preprocessor_config.json)",
            where=source.location,
            fix="copy these files of the original model into it, or load it with FastLanguageModel to train on text",
        )
    try:
        processor = AutoProcessor.from_pretrained(source.location, trust_remote_code=trust_remote_code)
    except ImportError as error:
        raise PackageMissing(
            f"the image processor needs a package that is not installed: {' '.join(str(error).split())[:300]}",
            where=source.name,
            fix="pip install pillow torchvision",
        ) from error
    except Exception as error:  # as for tokenizers
        missing = [name for name in ("PIL", "torchvision") if find_spec(name) is None]
        raise TokenizerProblem(
            f"the processor cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            where=source.name,
            fix=f"install {' and '.join(missing)}, which some processors need"
            if missing
            else "download or save the model again",
        ) from error
    if getattr(processor, "image_processor", None) is None:
        raise TokenizerProblem(
            f"the model's processor ({type(processor).__name__}) reads no images",
            where=source.name,
            fix="load the model with FastLanguageModel",
        )
    share_template(processor)
    return processor


def set_pad_token(tokenizer: Any, model: Any) -> None:
    """Give the tokenizer a padding token that is not its EOS token, where the vocabulary has one to spare.

    With padding = EOS, collators that hide padding from the loss also hide every real EOS, and the model never
    learns to stop. The vocabulary and the embeddings keep their size: only existing tokens are used, and EOS stays
    the padding token where nothing else is free.
    """
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        before, chosen = tokenizer.pad_token, _spare_token(tokenizer, model)
        chosen = chosen or tokenizer.eos_token
        if chosen is not None and chosen != before:
            tokenizer.pad_token = chosen
            why = "the tokenizer has none" if before is None else f"it was '{before}', the EOS token"
            logger.info("pronghorn: the padding token is '%s': %s", chosen, why)
        elif chosen is not None:
            logger.info("pronghorn: padding stays '%s', the EOS token: no token is to spare", chosen)
    if tokenizer.pad_token_id is not None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        logger.warning(
            "pronghorn: the tokenizer has %d tokens and the model embeds %d: the last ones cannot be used",
            len(tokenizer),
            rows,
        )


def _spare_token(tokenizer: Any, model: Any) -> str | None:
    """An existing token that text never needs: a padding, reserved or unknown token, in this order."""
    rows = model.get_input_embeddings().weight.shape[0]
    taken = {tokenizer.eos_token, tokenizer.bos_token, None}
    vocabulary = tokenizer.get_vocab()
    special = [str(token) for token in tokenizer.added_tokens_decoder.values()] or list(
        tokenizer.all_special_tokens
    )
    reserved = [name for name in special if _SPARE.search(name)]
    for name in (*_PAD_NAMES, *reserved, tokenizer.unk_token):
        if name not in taken and vocabulary.get(name, rows) < rows:
            return str(name)
    return None
