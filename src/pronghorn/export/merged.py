"""A stock checkpoint with the adapters merged in, written tensor by tensor; the model in memory stays as it is."""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pronghorn.engine import auto_class, base_causal_lm
from pronghorn.errors import PackageMissing, UnknownArgument, nearest
from pronghorn.export.adapter import not_a_source, save_adapter
from pronghorn.export.checkpoint_gate import check_checkpoint
from pronghorn.export.folder import write_folder
from pronghorn.export.fp8 import SCALES, plan_fp8
from pronghorn.export.gate import place_for_second
from pronghorn.export.merge import Plan, plan_merge
from pronghorn.export.result import FOLDER_MARK, Export, mark_failed, settle
from pronghorn.export.safetensors_file import Entry, plan_shards, write_safetensors
from pronghorn.export.verify import verify_export
from pronghorn.kernels.fp8 import E4M3

SAVE_METHODS = ("merged_16bit", "merged_4bit", "fp8", "lora")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
#: Rows of a 4-bit matrix that bitsandbytes packs together on a CPU.
_BLOCK_ROWS = 32
#: About what a token takes in tokenizer.json.
_TOKEN_BYTES = 160


def save_merged(
    model: Any,
    tokenizer: Any,
    path: str | os.PathLike[str],
    save_method: str = "merged_16bit",
    max_shard_size: int | str = "5GB",
    *,
    verify: bool = True,
    held_out: Sequence[str] | None = None,
) -> Export:
    """Write a checkpoint that stock Transformers loads without PEFT, completely or not at all.

    Adapters are added to each weight in fp32 and rounded once, to the dtype the model computes in (so a model that was
    loaded in fp32 is written in fp32). Memory holds one weight at a time beside the model, which stays unmerged and
    trainable. A folder that stands at `path` is replaced when the new one is complete and has been read back.

    Args:
        tokenizer: written beside the weights; None leaves it out.
        save_method: "merged_16bit"; "merged_4bit" quantises the merged model to NF4 with bitsandbytes; "fp8" stores
            linear layers as e4m3 with a scale a block (see `export.fp8`); "lora" writes the adapter alone.
        verify: load it again with stock Transformers, compare what it predicts and look for every adapter: takes room
            for a second model, and some forward passes of about 100 tokens. The names, shapes and dtypes in the files
            are compared in any case.
        held_out: texts to compare on, best from held-out rows; some short ones when None.

    Raises:
        SaveFailed: for a full disk, a folder that cannot be written, an adapter without a merged form.
        NotExportable: for a model that fp8 has no form for.
        ExportMismatch: when the files read back differ from the plan.
        ExportDiffers: when it predicts otherwise than the model; the folder is kept, export.failed.txt in it says so.
        PackageMissing: for "merged_4bit" without bitsandbytes.
    """
    check_save_method(save_method)
    if save_method == "lora":
        return save_adapter(model, tokenizer, path, verify=verify)
    if save_method == "merged_4bit" and find_spec("bitsandbytes") is None:
        raise PackageMissing("merged_4bit needs the package bitsandbytes", fix="pip install bitsandbytes")
    shard_bytes = parse_size(max_shard_size)
    plan, quantisation = plan_fp8(model) if save_method == "fp8" else (plan_merge(model), None)
    target = not_a_source(model, path)
    export = Export(target, [target])

    def write(folder: Path) -> None:
        if save_method == "merged_4bit":
            _write_4bit(model, plan, folder, shard_bytes)
        else:
            write_checkpoint(model, plan, folder, shard_bytes, quantisation)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        if verify:
            found = check_checkpoint(model, tokenizer, folder, save_method, held_out)
            found.name = target.name
            export.checks.append(found)
            mark_failed(folder / FOLDER_MARK, found)

    # 4-bit goes by way of the unquantised checkpoint on the disk, so that memory never holds that.
    needed = plan.nbytes * 3 // 2 if save_method == "merged_4bit" else plan.nbytes
    write_folder(target, needed + _TOKEN_BYTES * int(getattr(tokenizer, "vocab_size", 0)), write)
    exact = "save the adapter (save_method='lora')"
    return settle(
        export, exact if save_method == "merged_16bit" else f"{exact}, or save_method='merged_16bit'"
    )


def check_save_method(save_method: str) -> None:
    """Raises:
    UnknownArgument: for a name that is none, with the nearest that is one.
    """
    if save_method not in SAVE_METHODS:
        raise UnknownArgument(
            f"save_method='{save_method}' does not exist",
            fix=nearest(save_method, SAVE_METHODS) or f"use one of {', '.join(SAVE_METHODS)}",
        )


def write_checkpoint(
    model: Any, plan: Plan, folder: Path, shard_bytes: int, quantisation: dict[str, Any] | None = None
) -> None:
    """Weights, index, config.json and generation_config.json of a merged model, read back and compared.

    Args:
        quantisation: what config.json says about how weights are stored.
    """
    _write_weights(plan.entries, folder, shard_bytes)
    base = base_causal_lm(model)
    config = copy.deepcopy(base.config)
    config.__dict__.pop("quantization_config", None)
    if quantisation is not None:
        config.quantization_config = quantisation
    config.dtype = _main_dtype(plan)
    config.architectures = [type(base).__name__]
    if plan.ties_broken:
        config.tie_word_embeddings = False
    config.save_pretrained(str(folder))
    if base.can_generate() and getattr(base, "generation_config", None) is not None:
        # save_pretrained refuses some combinations of sampling settings that published models have.
        base.generation_config.to_json_file(folder / "generation_config.json")
    verify_export(folder, plan.entries)


def _main_dtype(plan: Plan) -> torch.dtype:
    """The dtype the model computes in: of its largest tensor that is no code."""
    floats = [
        entry for entry in plan.entries if entry.dtype.is_floating_point and not entry.name.endswith(SCALES)
    ]
    return max((entry for entry in floats if entry.dtype != E4M3), key=lambda entry: entry.nbytes).dtype


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
    from transformers import BitsAndBytesConfig

    dtype = _main_dtype(plan)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as between:
        write_checkpoint(model, plan, Path(between), shard_bytes)
        base = base_causal_lm(model)
        quantised = auto_class(base.config, architecture=type(base).__name__).from_pretrained(
            between,
            dtype=dtype,
            device_map={"": place_for_second(model, 0.75) or torch.device("cpu")},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=_kept_in_16_bits(base),
            ),
        )
        quantised.save_pretrained(str(folder), max_shard_size=shard_bytes)


def _kept_in_16_bits(base: Any) -> list[str] | None:
    """Modules to leave out: None for those that are left out anyway, besides them linear layers whose outputs are no
    whole blocks of 32. bitsandbytes cannot run these on a CPU, and they are small: gates of linear attention.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    narrow = [
        name.removesuffix(".base_layer")
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module.out_features % _BLOCK_ROWS and ".lora_" not in name
    ]
    return sorted({*narrow, *get_keys_to_not_convert(base)}) if narrow else None


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
