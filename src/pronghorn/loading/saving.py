"""Conveniences that live on the loaded instance, as older scripts expect them; no class is touched."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pronghorn import export
from pronghorn.engine import base_causal_lm
from pronghorn.errors import PronghornError, UnknownArgument
from pronghorn.loading.arguments import note_without_effect, refuse_unknown
from pronghorn.loading.fp8 import is_fp8
from pronghorn.loading.hub import download
from pronghorn.loading.int8 import is_int8
from pronghorn.loading.tokenizer import load_tokenizer

logger = logging.getLogger("pronghorn")

COMMIT_MESSAGE = "Trained with pronghorn"
#: Arguments of Transformers' and Unsloth's uploads that have nothing to switch here.
NO_EFFECT_ON_UPLOADING = frozenset(
    {"maximum_memory_usage", "safe_serialization", "tags", "temporary_location", "use_temp_dir"}
)


def save_pretrained_merged(
    model: Any,
    save_directory: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    *,
    max_shard_size: int | str = "5GB",
    verify: bool = True,
    held_out: Sequence[str] | None = None,
) -> export.Export:
    """Write a stock checkpoint with the adapter merged in; see `pronghorn.export.save_merged`. Without a tokenizer, the
    one that the model was loaded with is written."""
    stored = "fp8" if is_fp8(model) else "int8" if is_int8(model) else None
    if save_method != "lora" and stored is not None:
        logger.warning(
            "pronghorn: the adapter is merged into the %s values that it was trained on, not into the 16-bit weights "
            "they were made of; for those, load the base without load_in_%s, put the adapter on it and save",
            stored,
            stored,
        )
    return export.save_merged(
        model,
        _tokenizer_of(model) if tokenizer is None else tokenizer,
        save_directory,
        save_method,
        max_shard_size,
        verify=verify,
        held_out=held_out,
    )


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer where the base was loaded from; None where it is not there any more. Either is said."""
    source = base_causal_lm(model).__dict__.get("pronghorn_source")
    try:
        if source is not None:
            here = source if source.is_local else download(source, token=None, trust_remote_code=False)
            tokenizer = load_tokenizer(here)
            logger.warning("pronghorn: no tokenizer was given: the one of %s is saved", source.name)
            return tokenizer
    except PronghornError as error:
        logger.warning("pronghorn: %s", error.message)
    logger.warning("pronghorn: no tokenizer was given, and none is saved")
    return None


def save_pretrained_gguf(
    model: Any,
    save_directory: str,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    *,
    save_method: str = "merged",
    verify: bool = True,
    held_out: Sequence[str] | None = None,
) -> export.Export:
    """Write GGUF files with the adapter merged in; see `pronghorn.export.save_gguf`. `save_method="lora"` writes the
    adapter alone, as a GGUF LoRA in fp32; see `pronghorn.export.save_gguf_adapter`."""
    if save_method == "lora":
        return export.save_gguf_adapter(model, save_directory)
    if save_method != "merged":
        raise UnknownArgument(f"save_method='{save_method}' does not exist", fix="use 'merged' or 'lora'")
    tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
    return export.save_gguf(
        model, tokenizer, save_directory, quantization_method, verify=verify, held_out=held_out
    )


def push_to_hub(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = COMMIT_MESSAGE,
    **kwargs: Any,
) -> str:
    """Upload the adapter, or the whole model where it has none; see `pronghorn.export.push`."""
    form = "lora" if hasattr(model, "peft_config") else "merged_16bit"
    return push_to_hub_merged(
        model,
        repo_id,
        tokenizer,
        form,
        token=token,
        private=private,
        commit_message=commit_message,
        **kwargs,
    )


def push_to_hub_merged(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = COMMIT_MESSAGE,
    **kwargs: Any,
) -> str:
    """`save_pretrained_merged` into a folder that is uploaded; see `pronghorn.export.push`. Further arguments are
    `save_pretrained_merged`'s. Returns the repository's address."""
    saving = _saving_arguments(kwargs, save_pretrained_merged, push_to_hub_merged)
    export.check_save_method(save_method)

    def write(folder: str) -> None:
        save_pretrained_merged(model, folder, tokenizer, save_method, **saving)

    return export.push(write, repo_id, token=token, private=private, commit_message=commit_message)


def push_to_hub_gguf(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = COMMIT_MESSAGE,
    **kwargs: Any,
) -> str:
    """`save_pretrained_gguf` into a folder that is uploaded; see `pronghorn.export.push`. Further arguments are
    `save_pretrained_gguf`'s. Returns the repository's address."""
    saving = _saving_arguments(kwargs, save_pretrained_gguf, push_to_hub_gguf)

    def write(folder: str) -> None:
        save_pretrained_gguf(model, folder, tokenizer, quantization_method, **saving)

    return export.push(write, repo_id, token=token, private=private, commit_message=commit_message)


def _saving_arguments(
    given: Mapping[str, Any], saves: Callable[..., Any], function: Callable[..., Any]
) -> dict[str, Any]:
    """What is for the function that saves.

    Raises:
        UnknownArgument: for what neither has.
    """
    known = {*inspect.signature(saves).parameters}
    refuse_unknown(given, function, known | NO_EFFECT_ON_UPLOADING)
    note_without_effect(
        {name: value for name, value in given.items() if name in NO_EFFECT_ON_UPLOADING}, function.__name__
    )
    return {name: value for name, value in given.items() if name in known}


def add_save_methods(model: Any) -> None:
    """`model.save_pretrained_merged(folder, tokenizer)` and the others: partials of module-level functions, which
    survive deepcopy and pickle and point to the copy afterwards. A model without a head gets none: what is written is
    compared by the tokens it predicts."""
    if base_causal_lm(model).get_output_embeddings() is None:
        return
    for method in (
        save_pretrained_merged,
        save_pretrained_gguf,
        push_to_hub,
        push_to_hub_merged,
        push_to_hub_gguf,
    ):
        model.__dict__[method.__name__] = partial(method, model)
