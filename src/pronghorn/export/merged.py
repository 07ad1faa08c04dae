"""A stock checkpoint with the adapters merged in, written tensor by tensor; the model in memory stays as it is."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pronghorn.engine import base_causal_lm
from pronghorn.errors import PackageMissing, UnknownArgument, nearest
from pronghorn.export.adapter import save_adapter
from pronghorn.export.folder import write_folder
from pronghorn.export.merge import Plan, plan_merge
from pronghorn.export.safetensors_file import Entry, plan_shards, write_safetensors
from pronghorn.export.verify import verify_export

logger = logging.getLogger("pronghorn")

SAVE_METHODS = ("merged_16bit", "merged_4bit", "lora")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def save_merged(
    model: Any,
    tokenizer: Any,
    path: str | os.PathLike[str],
    save_method: str = "merged_16bit",
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a checkpoint that stock Transformers loads without PEFT, completely or not at all.

    Adapters are added to each weight in fp32 and rounded once, to the dtype the model computes in (so a model that was
    loaded in fp32 is written in fp32). Memory holds one weight at a time beside the model, which stays unmerged and
    trainable. A folder that stands at `path` is replaced when the new one is complete and has been read back.

    Args:
        tokenizer: written beside the weights; None leaves it out.
        save_method: "merged_16bit"; "merged_4bit" quantises the merged model to NF4 with bitsandbytes; "lora" writes
            the adapter alone.

    Returns:
        the folder.

    Raises:
        SaveFailed: for a full disk, a folder that cannot be written, an adapter without a merged form.
        ExportMismatch: when the files read back differ from the plan.
        PackageMissing: for "merged_4bit" without bitsandbytes.
    """
    if save_method not in SAVE_METHODS:
        raise UnknownArgument(
            f"save_method='{save_method}' does not exist",
            fix=nearest(save_method, SAVE_METHODS) or f"use one of {', '.join(SAVE_METHODS)}",
        )
    if save_method == "lora":
        return save_adapter(model, tokenizer, path)
    if save_method == "merged_4bit" and find_spec("bitsandbytes") is None:
        raise PackageMissing("merged_4bit needs the package bitsandbytes", fix="pip install bitsandbytes")
    shard_bytes = parse_size(max_shard_size)
    plan = plan_merge(model)

    def write(folder: Path) -> None:
        if save_method == "merged_16bit":
            write_checkpoint(model, plan, folder, shard_bytes)
        else:
            _write_4bit(model, plan, folder, shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))

    # 4-bit goes by way of the unquantised checkpoint on the disk, so that memory never holds that.
    needed = plan.nbytes if save_method == "merged_16bit" else plan.nbytes * 3 // 2
    return write_folder(path, needed, write)


def write_checkpoint(model: Any, plan: Plan, folder: Path, shard_bytes: int) -> None:
    """Weights, index, config.json and generation_config.json of a merged model, read back and compared."""
    _write_weights(plan.entries, folder, shard_bytes)
    base = base_causal_lm(model)
    config = copy.deepcopy(base.config)
    config.__dict__.pop("quantization_config", None)
    config.dtype = _main_dtype(plan)
    config.architectures = [type(base).__name__]
    if plan.ties_broken:
        config.tie_word_embeddings = False
    config.save_pretrained(str(folder))
    if base.can_generate() and getattr(base, "generation_config", None) is not None:
        try:
            base.generation_config.save_pretrained(str(folder))
        except (
            ValueError
        ) as error:  # stock Transformers refuses some published combinations of sampling settings
            logger.warning("pronghorn: generation_config.json is left out: %s", error)
    verify_export(folder, plan.entries)


def _main_dtype(plan: Plan) -> torch.dtype:
    return max(
        (entry for entry in plan.entries if entry.dtype.is_floating_point), key=lambda e: e.nbytes
    ).dtype


def _write_weights(entries: Sequence[Entry], folder: Path, shard_bytes: int) -> None:
    shards = plan_shards(entries, shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", entries)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map.update({entry.name: name for entry in shard})
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def _write_4bit(model: Any, plan: Plan, folder: Path, shard_bytes: int) -> None:
    """Merge to the disk, load that quantised with stock Transformers, save it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = base_causal_lm(model)
    dtype = _main_dtype(plan)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as between:
        write_checkpoint(model, plan, Path(between), shard_bytes)
        quantised = AutoModelForCausalLM.from_pretrained(
            between,
            dtype=dtype,
            device_map={"": next(base.parameters()).device},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            ),
        )
        quantised.save_pretrained(str(folder), max_shard_size=shard_bytes)


def parse_size(size: int | str) -> int:
    """ "5GB", "500 MiB" or a number of bytes -> bytes.

    Raises:
        UnknownArgument: for anything else.
    """
    if isinstance(size, int) and size > 0:
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", str(size).strip().upper())
    if match is None or float(match[1]) <= 0:
        raise UnknownArgument(f"max_shard_size={size!r} is no size", fix='use for example "5GB"')
    return int(float(match[1]) * _UNITS[match[2] or ""])
