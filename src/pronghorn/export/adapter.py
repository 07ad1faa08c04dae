"""An adapter as a stock PEFT folder."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pronghorn.engine import base_causal_lm
from pronghorn.errors import SaveFailed
from pronghorn.export.adapter_probe import warn_of_unchanged
from pronghorn.export.folder import folder_of, write_folder
from pronghorn.export.gate import Checked
from pronghorn.export.result import FOLDER_MARK, Export, mark_failed, settle

#: How names begin in an adapter's files.
_AROUND = "base_model.model."


def save_adapter(
    model: Any,
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    beside: Callable[[Path], None] | None = None,
) -> Export:
    """Write the adapter (adapter_config.json, safetensors) and the tokenizer, completely or not at all.

    Args:
        beside: writes more files into the folder.
        verify: read it again with stock PEFT, on a base without weights, and compare every tensor; costs next to
            nothing.

    Raises:
        SaveFailed: for a model without an adapter, a full disk, a folder that cannot be written.
        ExportDiffers: when PEFT reads something else than what was trained; the folder is kept and marked.
    """
    if not hasattr(model, "peft_config"):
        raise SaveFailed(
            "the model has no adapter to save",
            fix="save it whole: pronghorn export --to merged_16bit, or model.save_pretrained_merged",
        )
    if base_causal_lm(model) is model and not getattr(model, "_hf_peft_config_loaded", False):
        raise SaveFailed(
            "this is the model inside of PEFT's, which alone knows how its adapter is saved",
            fix="write peft_model.save_pretrained(folder), or put adapters on with FastLanguageModel.get_peft_model",
        )
    target = not_the_base(model, path)
    if (target / "config.json").is_file() and any(target.glob("model*.safetensors")):
        raise SaveFailed(
            "the folder holds a whole model, which the adapter would take the place of",
            where=str(target),
            fix="name another folder",
        )
    export = Export(target, [target])

    def write(folder: Path) -> None:
        model.save_pretrained(str(folder), safe_serialization=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        if beside is not None:
            beside(folder)
        if verify:
            found = check_adapter(model, folder)
            found.name = target.name
            export.checks.append(found)
            mark_failed(folder / FOLDER_MARK, found)

    needed = sum(tensor.nbytes for name in model.peft_config for tensor in _state(model, name).values())
    write_folder(target, needed, write)
    return settle(export, "report this with the output of pronghorn doctor")


def not_the_base(model: Any, path: str | os.PathLike[str]) -> Path:
    """The folder to save to.

    Raises:
        SaveFailed: for the one that the base was loaded from: adapters that name it would be put on something else.
    """
    target = folder_of(path)
    base = Path(str(getattr(base_causal_lm(model), "name_or_path", None) or ""))
    if base.is_absolute() and target.resolve() == base.resolve():
        raise SaveFailed(
            "this is the folder that the model was loaded from", where=str(target), fix="name another folder"
        )
    return target


def not_a_source(model: Any, path: str | os.PathLike[str]) -> Path:
    """`not_the_base` for what is no adapter: it would take the place of the adapter that the model was loaded from.

    Raises:
        SaveFailed: for the folder of the base, or of an adapter of the model.
    """
    target = not_the_base(model, path)
    if str(target.resolve()) in model.__dict__.get("pronghorn_adapter_folders", ()):
        raise SaveFailed(
            "this is the folder that the adapter was loaded from",
            where=str(target),
            fix="name another folder",
        )
    return target


def check_adapter(model: Any, folder: Path) -> Checked:
    """Read every adapter of a folder as stock PEFT does, and compare its tensors with the model's.

    PEFT puts the folder's configuration on a base without weights (torch's meta device, so that this takes the
    adapter's memory alone), which says what tensors it will look for. Those that are the trained ones bit for bit, on
    modules of the same names, predict the same.
    """
    from peft import load_peft_weights

    checked = Checked(folder.name, bit_for_bit=True)
    for name in model.peft_config:
        below = folder / name
        place = below if name != "default" and below.is_dir() else folder
        wanted, trained = _wanted(model, place), _state(model, name)
        written = load_peft_weights(str(place), device="cpu")
        for key in sorted(wanted.keys() | trained.keys()):
            if key not in written:
                checked.problems.append(f"{key} is missing")
            elif key not in wanted or written[key].shape != wanted[key].shape:
                checked.problems.append(f"PEFT has no place for {key}")
            elif key not in trained or not torch.equal(written[key], trained[key].detach().cpu()):
                checked.problems.append(f"{key} is not what was trained")
        # All else that PEFT writes are embeddings that were resized.
        foreign = sorted(key for key in written.keys() - wanted.keys() if "lora_" in key)
        checked.problems += [f"PEFT has no place for {key}" for key in foreign]
        adapted = [key for key in trained if "lora_B" in key or "lora_embedding_B" in key]
        warn_of_unchanged([key for key in adapted if not trained[key].any()], len(adapted))
        checked.adapted += len(adapted)
    return checked


def _wanted(model: Any, folder: Path) -> dict[str, Tensor]:
    """What stock PEFT looks for in an adapter's folder: tensors without memory, by name."""
    from peft import PeftConfig, get_peft_model

    base = base_causal_lm(model)
    config = copy.deepcopy(base.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        bare = type(base)(config)
    return _state(get_peft_model(bare, PeftConfig.from_pretrained(folder), low_cpu_mem_usage=True), "default")


def _state(model: Any, name: str) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    # Transformers' own `add_adapter` puts pairs on a model without PEFT's around it.
    return {key if key.startswith(_AROUND) else f"{_AROUND}{key}": value for key, value in found.items()}
