"""What a report tells of a run besides its curves: settings and where they come from, data, model, machine."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from pronghorn.data.rows import IGNORED
from pronghorn.engine import base_causal_lm, binding_of
from pronghorn.hardware import probe
from pronghorn.training.config import SFTConfig
from pronghorn.tuning.run_record import Setting

#: Rows of the data whose tokens are counted; of more, this many evenly spread ones.
COUNTED_ROWS = 20_000
_PACKAGES = ("pronghorn", "torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "triton")
#: Set by the trainer for its own batches.
_INTERNAL = ("accelerator_config",)
_SECRETS = ("token", "password", "secret", "key")


def values_of(args: SFTConfig) -> dict[str, Any]:
    """The arguments by name as plain values, without what may be a secret."""
    plain = args.to_dict()
    names = [item.name for item in dataclasses.fields(args) if item.init]
    return {
        name: _without_secrets(plain.get(name))
        for name in names
        if name not in _INTERNAL and not name.endswith(_SECRETS)
    }


def _without_secrets(value: Any) -> Any:
    """Arguments within an argument, such as the token in `model_init_kwargs`."""
    if not isinstance(value, Mapping):
        return value
    return {
        name: _without_secrets(inner) for name, inner in value.items() if not str(name).endswith(_SECRETS)
    }


def settings_of(trainer: Any, asked: Mapping[str, Any]) -> list[Setting]:
    """Every setting of a run, those somebody chose first.

    Args:
        asked: `values_of` the arguments as the trainer was given them; what differs by now was worked out.
    """
    given = trainer.args.given
    found = []
    for name, value in values_of(trainer.args).items():
        if value != asked.get(name):
            found.append(Setting(name, value, "planned", f"was {asked.get(name)!r}"))
        else:
            found.append(Setting(name, value, "given" if name in given else "default"))
    found += _adapter_settings(trainer.model)
    found += _engine_settings(trainer)
    order = ("given", "planned", "default")
    return sorted(found, key=lambda setting: order.index(setting.source))


def _adapter_settings(model: Any) -> list[Setting]:
    config = (getattr(model, "peft_config", None) or {}).get("default")
    if config is None:
        return []
    names = {item.name: item for item in dataclasses.fields(config)}
    plain = config.to_dict()
    shown = [
        "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "bias", "use_rslora",
        "use_dora", "init_lora_weights", "layers_to_transform", "rank_pattern", "alpha_pattern",
    ]  # fmt: skip
    found = []
    for name in shown:
        if name in names:
            value = plain[name]
            if isinstance(value, set | list | tuple) and name == "target_modules":
                # PEFT may spell out the module of every layer.
                value = sorted({str(path).rpartition(".")[2] for path in value})
            value = getattr(value, "value", value)
            source = "default" if not value or value == names[name].default else "given"
            found.append(Setting(f"adapter {name}", value, source))  # type: ignore[arg-type]
    return found


def _engine_settings(trainer: Any) -> list[Setting]:
    binding = binding_of(trainer.model)
    if binding is None or not binding.bound:
        return []
    levels = binding.save_levels
    counts = ", ".join(f"{levels.count(level)} x {level}" for level in dict.fromkeys(levels))
    planned = binding.automatic or trainer.args.memory_budget is not None
    return [Setting("save levels of the layers", counts, "planned" if planned else "given")]


def data_facts(rows: Any) -> dict[str, Any]:
    """Rows, documents and tokens of prepared rows, and the share that is trained on; empty for a stream."""
    if not hasattr(rows, "__len__") or "labels" not in (getattr(rows, "column_names", None) or ()):
        return {}
    count = len(rows)
    stride = max(-(-count // COUNTED_ROWS), 1)
    counted = rows.select(range(0, count, stride)) if stride > 1 else rows
    table = counted.with_format("arrow")[:]
    labels = table.column("labels").combine_chunks()
    lengths = np.asarray(labels.value_lengths())
    if "seq_lengths" in table.column_names:
        lengths = np.asarray(table.column("seq_lengths").combine_chunks().flatten())
    supervised = int((np.asarray(labels.flatten()) != IGNORED).sum())
    tokens = int(lengths.sum())
    facts = {
        "rows": count,
        "tokens": round(tokens * count / max(len(counted), 1)),
        "supervised share": round(supervised / max(tokens, 1), 4),
        "median length": int(np.median(lengths)),
        "95 % up to": int(np.quantile(lengths, 0.95)),
        "longest": int(lengths.max()),
    }
    if "seq_lengths" in table.column_names:
        facts["documents"] = round(len(lengths) * count / max(len(counted), 1))
    if stride > 1:
        facts["counted rows"] = len(counted)
    return facts


def model_facts(model: Any) -> dict[str, Any]:
    binding = binding_of(model)
    parameters = list(model.parameters())
    return {
        "name": str(getattr(model.config, "_name_or_path", "") or type(base_causal_lm(model)).__name__),
        "type": str(getattr(model.config, "model_type", "")),
        "parameters": sum(p.numel() for p in parameters),
        "trained parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "dtype": str(getattr(model, "dtype", "")).removeprefix("torch."),
        "engine": "stock forward" if binding is None else binding.describe(),
    }


def environment_facts(trainer: Any) -> dict[str, Any]:
    import torch

    hardware = probe()
    facts: dict[str, Any] = {name: found for name in _PACKAGES if (found := _version(name))}
    facts["python"] = platform.python_version()
    if torch.version.cuda and trainer.args.device.type == "cuda":
        facts["CUDA"] = torch.version.cuda
    facts |= {
        "system": platform.platform(terse=True),
        "device": hardware.name if trainer.args.device.type == hardware.device else trainer.args.device.type,
        "memory": hardware.memory_bytes,
        "CPU cores": hardware.cpu_cores,
        "compute dtype": str(hardware.compute_dtype),
        "processes": trainer.args.world_size,
    }
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
