"""Conveniences that live on the loaded instance, as older scripts expect them; no class is touched."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from pronghorn.errors import UnknownArgument
from pronghorn.export import GgufExport, save_adapter, save_gguf, save_gguf_adapter, save_merged
from pronghorn.loading.fp8 import is_fp8
from pronghorn.loading.int8 import is_int8

logger = logging.getLogger("pronghorn")


def save_pretrained_merged(
    model: Any,
    save_directory: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a stock checkpoint with the adapter merged in; see `pronghorn.export.save_merged`."""
    stored = "fp8" if is_fp8(model) else "int8" if is_int8(model) else None
    if save_method != "lora" and stored is not None:
        logger.warning(
            "pronghorn: the adapter is merged into the %s values that it was trained on, not into the 16-bit weights "
            "they were made of; for those, load the base without load_in_%s, put the adapter on it and save",
            stored,
            stored,
        )
    if save_method == "lora":
        save_adapter(model, tokenizer, save_directory)
    else:
        save_merged(model, tokenizer, save_directory, save_method, max_shard_size=max_shard_size)


def save_pretrained_gguf(
    model: Any,
    save_directory: str,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    *,
    save_method: str = "merged",
    verify: bool = True,
    held_out: Sequence[str] | None = None,
) -> GgufExport:
    """Write GGUF files with the adapter merged in; see `pronghorn.export.save_gguf`. `save_method="lora"` writes the
    adapter alone, as a GGUF LoRA in fp32; see `pronghorn.export.save_gguf_adapter`."""
    if save_method == "lora":
        file = save_gguf_adapter(model, save_directory)
        return GgufExport(file.parent, [file])
    if save_method != "merged":
        raise UnknownArgument(f"save_method='{save_method}' does not exist", fix="use 'merged' or 'lora'")
    return save_gguf(model, tokenizer, save_directory, quantization_method, verify=verify, held_out=held_out)


def add_save_methods(model: Any) -> None:
    """`model.save_pretrained_merged(folder, tokenizer)` and the others: partials of module-level functions, which
    survive deepcopy and pickle and point to the copy afterwards."""
    for method in (save_pretrained_merged, save_pretrained_gguf):
        model.__dict__[method.__name__] = partial(method, model)
