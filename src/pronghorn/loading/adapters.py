"""Stock PEFT adapters on a loaded model, with names checked first and the initialisation reproducible."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from pronghorn.engine import base_causal_lm
from pronghorn.errors import (
    AdapterMismatch,
    AdapterProblem,
    CheckpointCorrupt,
    TargetModuleNotFound,
    UnsupportedCheckpoint,
    nearest,
)
from pronghorn.families import family_of
from pronghorn.importing import collector_paused
from pronghorn.loading.adapter_settings import check_settings
from pronghorn.loading.checkpoint import check_safetensors, read_header
from pronghorn.loading.compensation import begin_with_residual, check_base, is_compensating, loftq_settings
from pronghorn.loading.experts import ALL_LINEAR, shown_as_plain, tell_unadapted, with_experts
from pronghorn.loading.fp8 import know_stored
from pronghorn.loading.source import ADAPTER_CONFIG, Source, read_json
from pronghorn.loading.towers import language_linears, language_path, language_targets

logger = logging.getLogger("pronghorn")

ADAPTER_WEIGHTS = "adapter_model.safetensors"
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WHOLE = ("embed_tokens", "lm_head")
#: type -> linear layers whose weights it reads past their modules: PEFT refuses an adapter on `out_proj`, and one on
#: `dt_proj` would have no effect
_PAST_MODULES = {
    "falcon_h1": {"out_proj"},
    "falcon_mamba": {"out_proj", "dt_proj"},
    "jamba": {"dt_proj"},
    "mamba": {"out_proj", "dt_proj"},
    "mamba2": {"out_proj"},
    "nemotron_h": {"out_proj"},
}


def lora_config_fields() -> set[str]:
    """Names of PEFT's LoraConfig; any of them may be passed through."""
    with collector_paused():
        from peft import LoraConfig

    return {field.name for field in fields(LoraConfig)}


def add_adapter(model: Any, random_state: int, revision: str | None = None, **settings: Any) -> Any:
    """Wrap a causal LM into a PEFT model with a new LoRA adapter; everything else is frozen.

    Adapter weights are fp32, PEFT's default, whatever the base is stored in. The initialisation depends on
    `random_state` alone, and the global random state stays as it was. Quantised bases need none of
    `prepare_model_for_kbit_training`: PEFT freezes them, the norms' arithmetic is fp32 anyway, and blocks with an
    explicit backward need no input that requires a gradient.

    Args:
        settings: arguments of `peft.LoraConfig`.

    Raises:
        AdapterProblem: when the model has an adapter already, or PEFT refuses the settings.
        TargetModuleNotFound: for names the model does not have.
        QuantisationRefused: for a beginning that a quantised model cannot have.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    if has_adapter(model):
        raise AdapterProblem(
            "the model has an adapter already",
            fix="train that one, or load the base model again for a new one",
        )
    asked_for = settings.get("target_modules")
    targets, parameters = with_experts(
        model,
        asked_for,
        settings.get("target_parameters"),
        DEFAULT_TARGETS,
        settings.get("layers_to_transform"),
    )
    settings["target_parameters"] = parameters
    settings["target_modules"], settings["modules_to_save"] = check_targets(
        model,
        targets,
        settings.get("modules_to_save"),
        alone=not parameters,
        by_name=settings.get("layers_to_transform") is not None,
    )
    check_settings(model, settings)
    _keep_to_language_model(model, settings)
    settings.setdefault("task_type", TaskType.CAUSAL_LM)
    residual = None
    if is_compensating(model, settings.get("init_lora_weights")):
        residual = loftq_settings(settings.pop("loftq_config", None))
        settings["init_lora_weights"] = True
    try:
        config = LoraConfig(**{name: value for name, value in settings.items() if value is not None})
        know_stored(config, model)
        with shown_as_plain(model), torch.random.fork_rng(devices=_cuda_devices(model)):
            torch.manual_seed(random_state)
            wrapped = get_peft_model(model, config, revision=revision)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise AdapterProblem(f"PEFT refuses these settings: {' '.join(str(error).split())[:400]}") from error
    if residual is not None:
        begin_with_residual(wrapped, residual)
    if asked_for in (None, DEFAULT_TARGETS, ALL_LINEAR):
        tell_unadapted(wrapped)
    return wrapped


def _keep_to_language_model(model: Any, settings: dict[str, Any]) -> None:
    """Names of modules mean those of the language model where another part of the model may have some of that name; a
    regular expression stays what it is."""
    path, targets = language_path(model), settings["target_modules"]
    if path is None or (isinstance(targets, str) and targets != ALL_LINEAR):
        return
    names = language_linears(model, path) if isinstance(targets, str) else targets
    settings["target_modules"] = language_targets(path, names, settings.pop("layers_to_transform", None))
    settings.pop("layers_pattern", None)


def has_adapter(model: Any) -> bool:
    """Whether PEFT has put anything on the model, around it or inside it."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(model, PeftModel) or any(
        isinstance(module, BaseTunerLayer) for module in model.modules()
    )


def check_targets(
    model: Any,
    target_modules: str | Iterable[str] | None,
    modules_to_save: Iterable[str] | None,
    *,
    alone: bool = True,
    by_name: bool = False,
) -> tuple[str | list[str], list[str] | None]:
    """Names that exist. Embeddings and head go from the targets to `modules_to_save`: they are trained whole.

    Args:
        alone: no parameters are adapted besides the modules, so there has to be one.
        by_name: all linear layers are given by their names, which PEFT asks for where layers are chosen.

    Raises:
        TargetModuleNotFound: for a name without a module, with the nearest; for a pattern that matches nothing.
    """
    names = [name for name, _ in model.named_modules() if name]
    if target_modules is None or target_modules is DEFAULT_TARGETS:
        target_modules = _default_targets(names)
    if target_modules == ALL_LINEAR:
        target_modules = _all_linear(model, by_name)
    whole = [modules_to_save] if isinstance(modules_to_save, str) else list(modules_to_save or [])
    if isinstance(target_modules, str):
        targets: str | list[str] = _check_pattern(target_modules, names)
    elif not isinstance(target_modules, Iterable) or not all(isinstance(n, str) for n in target_modules):
        raise TargetModuleNotFound(
            f"target_modules={target_modules!r} are no names", fix=f"use such as {list(DEFAULT_TARGETS)}"
        )
    else:
        wanted = list(dict.fromkeys(_as_named_here(model, target_modules)))
        moved = [name for name in wanted if name.rsplit(".", 1)[-1] in _WHOLE]
        if moved:
            logger.info("pronghorn: %s: trained whole (modules_to_save), without LoRA", ", ".join(moved))
            whole += [name for name in moved if name not in whole]
            wanted = [name for name in wanted if name not in moved]
        if not wanted and alone:
            raise TargetModuleNotFound(
                "no module is left for LoRA", fix=f"give target_modules, for example {list(DEFAULT_TARGETS)}"
            )
        targets = wanted
        _check_names(wanted, names, "target_modules")
    _check_names(whole, names, "modules_to_save")
    return targets, whole or None


def _as_named_here(model: Any, names: Iterable[str]) -> list[str]:
    """Names of projections as most families have them, by the modules that give the same: Phi-3 has one for q, k and v,
    DeepSeek two for q."""
    config = base_causal_lm(model).config
    family = family_of(config.model_type)
    if family is None:
        return list(names)
    held = family.for_config(config).parts.by_usual_name
    found = [here for name in names for here in held.get(name, (name,))]
    if found != list(names):
        told = ", ".join(dict.fromkeys(here for name in names for here in held.get(name, ())))
        logger.info(
            "pronghorn: %s models have %s for what others call q_proj and the like", family.name, told
        )
    return found


def _default_targets(names: Sequence[str]) -> str | Iterable[str]:
    """The names of Llama-like models; all linear layers where a model has others."""
    if {*DEFAULT_TARGETS} <= {name.rsplit(".", 1)[-1] for name in names}:
        return DEFAULT_TARGETS
    logger.info("pronghorn: the model names its layers otherwise: the adapter is put on all linear layers")
    return ALL_LINEAR


def _all_linear(model: Any, by_name: bool) -> str | list[str]:
    """ "all-linear", or the names of all linear layers that can bear an adapter, where some cannot: routers that are
    linear layers and give more than a product, and those whose weights a model reads past their modules.

    Args:
        by_name: names in any case.
    """
    linear = {
        name.rpartition(".")[2]: type(module).__name__.endswith("Router")
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not model.get_output_embeddings()
    }
    past = _PAST_MODULES.get(base_causal_lm(model).config.model_type, set())
    left_out = sorted(name for name, router in linear.items() if router or name in past)
    if not left_out and not by_name:
        return ALL_LINEAR
    if left_out:
        logger.info("pronghorn: no adapter on %s, which cannot bear one", ", ".join(left_out))
    return [name for name in linear if name not in left_out]


def _check_pattern(pattern: str, names: Sequence[str]) -> str:
    """ "all-linear" or a regular expression over full module names, as PEFT reads a string; one plain name counts."""
    if pattern == ALL_LINEAR:
        return pattern
    if pattern.isidentifier():
        _check_names([pattern], names, "target_modules")
        return rf".*\.{pattern}"
    try:
        found = any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise TargetModuleNotFound(
            f"target_modules='{pattern}' is no regular expression: {error}", fix="give a list of names"
        ) from error
    if not found:
        raise TargetModuleNotFound(
            f"target_modules='{pattern}' matches no module",
            fix="the expression must match full names, as in '.*q_proj'",
        )
    return pattern


def _check_names(wanted: Iterable[str], names: Sequence[str], argument: str) -> None:
    known = {part for name in names for part in (name, name.rsplit(".", 1)[-1])}
    endings = sorted({name.rsplit(".", 1)[-1] for name in names if not name.rsplit(".", 1)[-1].isdigit()})
    for name in wanted:
        if name in known or any(full.endswith(f".{name}") for full in names):
            continue
        raise TargetModuleNotFound(
            f"{argument} has '{name}', which the model does not have",
            fix=nearest(name, endings) or f"its modules are {', '.join(endings)}",
        )


def _cuda_devices(model: Any) -> list[int]:
    devices = {parameter.device for parameter in model.parameters()}
    return sorted(device.index for device in devices if device.type == "cuda" and device.index is not None)


def check_adapter_files(source: Source) -> dict[str, Any]:
    """Look at a PEFT folder before PEFT does; returns adapter_config.json.

    Raises:
        UnsupportedCheckpoint: for pickled weights.
        CheckpointCorrupt: for missing or truncated weights, or an unreadable configuration.
    """
    config = read_json(source.path / ADAPTER_CONFIG)
    weights = source.path / ADAPTER_WEIGHTS
    if not weights.is_file():
        if (source.path / "adapter_model.bin").is_file():
            raise UnsupportedCheckpoint(
                "the adapter's weights are pickled, and unpickling runs code from the file",
                where=str(source.path / "adapter_model.bin"),
                fix="convert where you trust the file: load it with PEFT and save_pretrained writes safetensors",
            )
        raise CheckpointCorrupt(
            f"the adapter has no {ADAPTER_WEIGHTS}", where=source.location, fix="save or download it again"
        )
    check_safetensors(weights)
    return config


def _made_for_another(model: Any, detail: str, where: str) -> AdapterMismatch:
    kind = base_causal_lm(model).config.model_type
    return AdapterMismatch(
        f"the adapter was made for another model than this {kind} one: {detail}",
        where=where,
        fix="load it on the model it was trained on; check base_model_name_or_path in adapter_config.json",
    )


def _grow_embeddings(model: Any, source: Source) -> None:
    """Rows for tokens that were added before the adapter was trained, where its file has the whole embedding."""
    base = base_causal_lm(model)
    embedding = base.get_input_embeddings()
    if hasattr(model, "peft_config") or embedding is None:
        return
    name = next(name for name, module in base.named_modules() if module is embedding)
    shapes = [
        entry["shape"]
        for stored, entry in read_header(source.path / ADAPTER_WEIGHTS).items()
        if f".{name}." in stored and "lora_" not in stored
    ]
    own = list(embedding.weight.shape)
    rows = max((shape[0] for shape in shapes if shape[1:] == own[1:]), default=0)
    if rows > own[0]:
        logger.warning(
            "pronghorn: the adapter's embedding has %d rows, the model's %d: it gets as many", rows, own[0]
        )
        base.resize_token_embeddings(rows, mean_resizing=False)


def load_adapter(model: Any, source: Source, name: str = "default") -> Any:
    """Put a saved adapter on its base model, ready to be trained on; or on a PEFT model, beside those it has, frozen.

    Args:
        name: what PEFT calls it; no dots.

    Returns:
        the PEFT model; an adapter that was active stays so.

    Raises:
        AdapterMismatch: when its weights do not belong to this base model.
        CheckpointCorrupt: when some are missing.
    """
    with collector_paused():
        from peft import PeftConfig, PeftModel
        from peft.utils import get_peft_model_state_dict

    mark = check_base(model, check_adapter_files(source), source.location)
    _grow_embeddings(model, source)
    try:
        config = PeftConfig.from_pretrained(source.location)
        config.loftq_config = mark or config.loftq_config  # PEFT drops what it does not know
        know_stored(config, model)
        with shown_as_plain(model):
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
                model.load_adapter(source.location, adapter_name=name)
                wrapped = model
            else:
                wrapped = PeftModel.from_pretrained(
                    model, source.location, adapter_name=name, is_trainable=True, config=config
                )
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        text = " ".join(str(error).split())
        shapes = re.search(
            r"size mismatch for (\S+): .*? shape (\S.*?) from checkpoint, .*? is (\S.*?\))", text
        )
        if shapes is not None:
            tensor, stored_shape, shape = shapes.groups()
            text = f"{tensor} is {stored_shape} in it and {shape} here"
        raise _made_for_another(model, text[:400], source.location) from error
    stored = set(read_header(Path(source.location) / ADAPTER_WEIGHTS))
    expected = set(get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False))
    foreign = sorted(name for name in stored - expected if "lora_" in name)
    if foreign:
        detail = f"{len(foreign)} of its weights have no place here, first {foreign[0]}"
        raise _made_for_another(wrapped, detail, str(source.path / ADAPTER_WEIGHTS))
    if expected - stored:
        absent = sorted(expected - stored)
        raise CheckpointCorrupt(
            f"{len(absent)} adapter weights are missing, first {absent[0]}",
            where=str(source.path / ADAPTER_WEIGHTS),
            fix="save or download the adapter again",
        )
    folders = wrapped.__dict__.get("pronghorn_adapter_folders", ())
    wrapped.__dict__["pronghorn_adapter_folders"] = (*folders, str(Path(source.location).resolve()))
    return wrapped
