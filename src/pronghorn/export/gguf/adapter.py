"""An adapter as a GGUF LoRA file, which llama.cpp and Ollama add to the base model's GGUF file when they load it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.engine import base_causal_lm
from pronghorn.errors import ExportMismatch, NotExportable, PackageMissing
from pronghorn.export.adapter_probe import warn_of_unchanged
from pronghorn.export.folder import folder_of, write_beside
from pronghorn.export.gate import Checked
from pronghorn.export.gguf.architecture import Dialect, dialect_of
from pronghorn.export.gguf.file import write_gguf
from pronghorn.export.gguf.methods import Method
from pronghorn.export.result import Export
from pronghorn.export.safetensors_file import Entry


def save_gguf_adapter(model: Any, path: str | os.PathLike[str]) -> Export:
    """Write the active adapter as FOLDER.lora.gguf into a folder, in fp32, completely or not at all.

    llama.cpp computes W x + (alpha / r) B A x with one alpha for all; where scalings differ (rank patterns, rsLoRA),
    the difference is in B.

    Raises:
        NotExportable: for anything but plain LoRA on linear layers.
        SaveFailed: for a full disk, or a folder that cannot be written.
        ExportMismatch: where a tensor reads back otherwise; nothing is replaced then.
    """
    if find_spec("gguf") is None:
        raise PackageMissing(
            "the package gguf, which writes GGUF files, is not installed", fix="pip install gguf"
        )
    dialect = dialect_of(base_causal_lm(model).config)
    found = list(_adapted(model))
    if not found:
        raise _not_plain("the model has no adapter")
    alpha = float(found[0][1].scaling[found[0][2]] * found[0][1].r[found[0][2]])
    entries = [
        entry for name, module, adapter in found for entry in _pair(dialect, name, module, adapter, alpha)
    ]
    target = folder_of(path)
    file_name = f"{target.name}.lora.gguf"

    def describe(writer: Any) -> None:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_name(target.name)

    def write(folder: Path) -> None:
        write_gguf(folder / file_name, dialect.architecture, describe, entries, Method("f32"))
        _check(folder / file_name, entries)

    write_beside(target, sum(entry.nbytes for entry in entries), write)
    warn_of_unchanged(
        [name for name, module, part in found if not module.lora_B[part].weight.any()], len(found)
    )
    return Export(target, [target / file_name], [Checked(file_name, adapted=len(found), bit_for_bit=True)])


def _adapted(model: Any) -> Iterator[tuple[str, Any, str]]:
    """(weight's name, PEFT's layer, adapter's name) of all adapted layers.

    Raises:
        NotExportable: where GGUF has no form for what is trained there.
    """
    for name, module in base_causal_lm(model).named_modules():
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            raise _not_plain(f"{name} is trained whole")
        if not hasattr(module, "base_layer"):
            continue
        active = [adapter for adapter in module.active_adapters if adapter in getattr(module, "lora_A", {})]
        if module.active_adapters and not active:
            raise _not_plain(f"{name} has an adapter of the kind {type(module).__name__}")
        if len(active) > 1:
            raise _not_plain("several adapters are active")
        for adapter in active:
            pair = (module.lora_A[adapter], module.lora_B[adapter])
            if adapter in module.lora_variant or not all(isinstance(part, nn.Linear) for part in pair):
                raise _not_plain(f"{name} has DoRA or another variant")
            if pair[1].bias is not None or not isinstance(module.base_layer, nn.Linear):
                raise _not_plain(f"{name} has a bias in its adapter, or is no linear layer")
            yield f"{name}.weight", module, adapter


def _pair(dialect: Dialect, name: str, module: Any, adapter: str, alpha: float) -> list[Entry]:
    a, b = (getattr(module, part)[adapter].weight for part in ("lora_A", "lora_B"))
    if not dialect.is_written(name):
        raise _not_plain(f"{name} is not the language model's")
    if len(dialect.places(name)) > 1:
        raise _not_plain(f"{name} stands in two parts in a GGUF file")
    scale = module.scaling[adapter] * module.r[adapter] / alpha
    left = Entry(name, tuple(a.shape), torch.float32, partial(_scaled, a, 1.0))
    right = Entry(name, tuple(b.shape), torch.float32, partial(_scaled, b, scale))
    if dialect.orders_columns(name):
        left = dialect.entries(left)[0]
    else:
        right = dialect.entries(right)[0]
    (place,) = dialect.places(name)
    return [replace(left, name=f"{place}.lora_a"), replace(right, name=f"{place}.lora_b")]


def _scaled(weight: Tensor, scale: float) -> Tensor:
    return weight.detach().to(torch.float32) * scale


def _check(path: Path, entries: list[Entry]) -> None:
    """Raises:
    ExportMismatch: when what is read back is not what was to be written.
    """
    from gguf import GGUFReader

    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for entry in entries:
        written = torch.from_numpy(found[entry.name].data.copy()) if entry.name in found else None
        if written is None or not torch.equal(written, entry.make().cpu()):
            raise ExportMismatch(f"{entry.name} is not what was written", where=str(path), fix="save again")


def _not_plain(why: str) -> NotExportable:
    return NotExportable(
        f"the adapter cannot be written as a GGUF LoRA: {why}",
        fix="write the merged model: save_pretrained_gguf with quantization_method='q8_0'",
    )
