"""Experts of a mixture: the names by which adapters are put on them, and 4-bit storage.

Transformers keeps the experts of a layer as two stacked parameters, `gate_up_proj` and `down_proj`, not as linear
layers. Quantisation of linear layers passes them by, though they are nearly all of the model; PEFT adapts them by
`target_parameters`.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pronghorn.engine import base_causal_lm
from pronghorn.engine.experts import innermost
from pronghorn.errors import AdapterProblem
from pronghorn.families import MixtureParts, family_of
from pronghorn.weights.experts import four_bit_states, hold_in_four_bits

logger = logging.getLogger("pronghorn")

GATE_UP, DOWN = "gate_up_proj", "down_proj"
#: what a checkpoint's or an older Transformers' linear layers of an expert are called -> the parameter they are in
_STACK_OF = {
    "gate_proj": GATE_UP,
    "up_proj": GATE_UP,
    "gate_up_proj": GATE_UP,
    "w1": GATE_UP,
    "w3": GATE_UP,
    "down_proj": DOWN,
    "w2": DOWN,
}
#: names that stand for a half of the stacked parameter
_HALVES = ({"gate_proj", "up_proj"}, {"w1", "w3"})
ALL_LINEAR = "all-linear"


def mixture_of(config: Any) -> MixtureParts | None:
    """Where the mixtures of experts are in models of a config, or None."""
    family = family_of(config.model_type)
    return None if family is None else family.mixture


def experts_of(model: Any, mixture: MixtureParts) -> Iterator[nn.Module]:
    """Every module of experts, or PEFT's wrapper of it."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == mixture.experts:
            yield module


# --- adapters --------------------------------------------------------------------------------------------------


def with_experts(
    model: Any,
    targets: str | Iterable[str] | None,
    parameters: Iterable[str] | None,
    defaults: Iterable[str],
    layers: int | Iterable[int] | None = None,
) -> tuple[Any, list[str] | None]:
    """`target_modules` and `target_parameters` of a LoRA that reaches the experts by the names of their layers.

    A model without experts, a regular expression, and names that mean no expert stay as they are. gate and up of an
    expert are one parameter, which gets one adapter of rank r. Linear layers of the same names (a shared expert, a
    dense layer in between) are named so that PEFT, which takes these names for those of experts, finds them, too.

    Args:
        layers: `layers_to_transform`, which PEFT does not apply to parameters.

    Raises:
        AdapterProblem: for one of gate and up without the other.
    """
    family = family_of(model.config.model_type)
    mixture = None if family is None else family.mixture
    kept = list(parameters) if parameters is not None else None
    if family is None or mixture is None or (isinstance(targets, str) and targets != ALL_LINEAR):
        return targets, kept
    linear = _linear_layers(model)
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    here = family.for_config(model.config).parts.by_usual_name
    if targets is None or targets is defaults:
        usual = {found for name in defaults for found in here.get(name, (name,))}
        wanted = list(dict.fromkeys([*(name for name in endings if name in usual), GATE_UP, DOWN]))
    elif targets == ALL_LINEAR:
        wanted = list(dict.fromkeys([*endings, GATE_UP, DOWN]))
    else:
        wanted = [found for name in targets for found in here.get(name, (name,))]
    stacked = {name: _STACK_OF[name] for name in wanted if name in _STACK_OF}
    _check_halves(wanted)
    modules = [name for name in wanted if name not in stacked]
    places = [mixture.experts] if layers is None else _experts_in(model, mixture, layers)
    found = [f"{place}.{stack}" for place in places for stack in dict.fromkeys(stacked.values())]
    beside = [name for name in linear if name.rpartition(".")[2] in stacked]
    if not _peft_renames(model):
        modules += list(dict.fromkeys(_last_two(name) for name in beside))
    elif _are_plain(model, beside):
        found += [
            f"{name}.weight" for name in beside if layers is None or _layer_of(name) in _numbers(layers)
        ]
    else:
        logger.warning(
            "pronghorn: no adapter on %d quantised linear layers beside the experts, first %s: PEFT takes their names "
            "for those of experts",
            len(beside),
            beside[0],
        )
    return modules, [*(kept or []), *(name for name in found if name not in (kept or []))]


def _check_halves(wanted: list[str]) -> None:
    """
    Raises:
        AdapterProblem: for one of gate and up without the other.
    """
    for halves in _HALVES:
        given = halves & {*wanted}
        if len(given) == 1 and GATE_UP not in wanted:
            (name,), (other,) = given, halves - given
            raise AdapterProblem(
                f"target_modules has '{name}' without '{other}': the experts have both in one parameter",
                fix=f"add '{other}', or leave out both",
            )


def _experts_in(model: Any, mixture: MixtureParts, layers: int | Iterable[int]) -> list[str]:
    """Names of the modules of experts in some layers."""
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == mixture.experts]
    return [name for name in names if _layer_of(name) in _numbers(layers)]


def _numbers(layers: int | Iterable[int]) -> list[int]:
    return [layers] if isinstance(layers, int) else list(layers)


def _layer_of(name: str) -> int:
    """The first number in a module's name."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def _linear_layers(model: Any) -> list[str]:
    """Names of the model's linear layers but the head."""
    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]


def _last_two(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def tell_unadapted(model: Any) -> None:
    """Say which stacks of experts a PEFT model has no adapter on: an adapter on all linear layers sounds as though it
    reached them, and they are most of a mixture."""
    from peft.tuners.lora.layer import ParamWrapper

    adapted = {
        (id(module.get_base_layer()), module.parameter_name)
        for module in model.modules()
        if isinstance(module, ParamWrapper)
    }
    left: dict[str, None] = {}
    for path, module in model.named_modules():
        if "expert" in f"{path}.{type(module).__name__}".lower() and not isinstance(module, ParamWrapper):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and (id(module), name) not in adapted:
                    left[_last_two(f"{path.replace('.base_layer', '')}.{name}")] = None
    if left:
        logger.warning(
            "pronghorn: no adapter on the experts, which are no linear layers and stay as they are: "
            "target_parameters=%s puts one on them",
            list(left),
        )


def _peft_renames(model: Any) -> bool:
    """Whether PEFT takes the names of an expert's layers for its stacked parameters on this type of model."""
    from peft.utils import transformers_weight_conversion as conversion

    kind = conversion._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    return kind in conversion._MOE_TARGET_MODULE_MAPPING


def _are_plain(model: Any, names: Iterable[str]) -> bool:
    return all(model.get_submodule(name).weight.is_floating_point() for name in names)


@contextmanager
def shown_as_plain(model: Any) -> Iterator[None]:
    """Stacks held in 4 bits are parameters meanwhile, which hold nothing: for PEFT, that only looks."""
    base = base_causal_lm(model)
    mixture = mixture_of(base.config)
    found = experts_of(base, mixture) if mixture is not None else ()
    held = [(experts, name) for experts in map(innermost, found) for name in four_bit_states(experts)]
    for experts, name in held:
        experts._parameters[name] = nn.Parameter(experts._buffers.pop(name), requires_grad=False)
    try:
        yield
    finally:
        for experts, name in held:
            experts.register_buffer(name, experts._parameters.pop(name).data, persistent=False)


# --- 4 bits ----------------------------------------------------------------------------------------------------


def quantise_experts(
    model: Any, quant_type: str, double_quant: bool, device: torch.device | None = None
) -> int:
    """Hold every stack of experts in 4 bits, as bitsandbytes does; returns how many there are.

    Args:
        device: where to, one stack at a time; the rest of the model follows. None leaves everything where it is.
    """
    mixture = mixture_of(model.config)
    if mixture is None:
        return 0
    done = 0
    for experts in map(innermost, experts_of(model, mixture)):
        for name in (GATE_UP, DOWN):
            if device is not None:
                experts._parameters[name].data = experts._parameters[name].data.to(device)
            hold_in_four_bits(experts, name, quant_type, double_quant)
            done += 1
        gc.collect()
    if device is not None:
        model.to(device)
        model.hf_device_map = {"": device}  # where accelerate looks
    return done
