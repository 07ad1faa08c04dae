"""Conveniences that live on the loaded instance, as older scripts expect them; no class is touched."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from pronghorn.export import save_adapter, save_merged
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


def add_save_methods(model: Any) -> None:
    """`model.save_pretrained_merged(folder, tokenizer)`: a partial of a module-level function, which survives
    deepcopy and pickle and points to the copy afterwards."""
    model.__dict__["save_pretrained_merged"] = partial(save_pretrained_merged, model)
