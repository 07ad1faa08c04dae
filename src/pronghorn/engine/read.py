"""From live Transformers and PEFT modules to the blocks' projections and norms.

Modules are read at every forward, so that an adapter added, switched off, merged or replaced later is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.blocks import Adapter, LinearProjection, ModuleProjection, Norm
from pronghorn.blocks.projection import Projection
from pronghorn.weights import read_weight


@dataclass(frozen=True)
class Reading:
    """What holds for one forward: training or not, and the seed that this layer's dropout masks start from."""

    training: bool
    seed: int = 0


def read_projection(module: nn.Module, reading: Reading, slot: int) -> Projection:
    """A linear module, possibly wrapped by PEFT, as a projection.

    Args:
        slot: the projection's number in its layer; separates the dropout masks of a layer's adapters.
    """
    module = active_module(module)
    if runs_more_than_its_class(module):
        return ModuleProjection(module, "it has hooks or a forward of its own, which only its module runs")
    if not hasattr(module, "base_layer"):
        weight = read_weight(module)
        if weight is None:
            return ModuleProjection(
                module, f"{type(module).__name__} is not a linear layer the blocks can read"
            )
        return LinearProjection(weight, _bias(module))
    return _read_peft(module, reading, slot)


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


_COLLECTING = "transformers.utils.output_capturing"


def runs_more_than_its_class(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: hooks, or a forward put on the instance.

    accelerate's own replacement of `forward` moves inputs between devices; a bound model lies on one. Transformers
    leaves a hook behind wherever it has once collected hidden states, which does nothing in later calls.
    """
    return bool(
        any(getattr(hook, "__module__", None) != _COLLECTING for hook in module._forward_hooks.values())
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in module.__dict__ and "_hf_hook" not in module.__dict__)
    )


def active_module(module: nn.Module) -> nn.Module:
    """The module that really runs: PEFT's trained copy of a `modules_to_save` entry, or the module itself."""
    copies = getattr(module, "modules_to_save", None)
    if copies is None or not hasattr(module, "original_module"):
        return module
    if module.disable_adapters or module.active_adapters[0] not in copies:  # type: ignore[index, operator]
        return module.original_module  # type: ignore[return-value]
    return copies[module.active_adapters[0]]  # type: ignore[index, no-any-return, operator]


def _read_peft(module: Any, reading: Reading, slot: int) -> Projection:
    base = module.base_layer
    if runs_more_than_its_class(base):
        return ModuleProjection(
            module, "its base layer has hooks or a forward of its own, which only its module runs"
        )
    weight = read_weight(base)
    if weight is None:
        return ModuleProjection(module, f"{type(base).__name__} is not a linear layer the blocks can read")
    if not hasattr(module, "lora_A"):
        return ModuleProjection(module, f"{type(module).__name__} is an adapter the blocks do not know")
    if module.disable_adapters and module.merged:
        return ModuleProjection(
            module, "its adapter is merged but switched off: PEFT has to unmerge it first"
        )
    if module.disable_adapters or module.merged:
        return LinearProjection(weight, _bias(base))
    adapters = []
    for index, name in enumerate(module.active_adapters):
        if name not in module.lora_A:
            continue
        if name in module.lora_variant:
            variant = type(module.lora_variant[name]).__name__.removesuffix("LinearVariant")
            return ModuleProjection(module, f"the adapter is a {variant} variant, which PEFT computes")
        pair = (module.lora_A[name], module.lora_B[name])
        if not all(isinstance(part, nn.Linear) for part in pair):
            return ModuleProjection(module, f"the adapter of {type(module).__name__} is no pair of matrices")
        if any(runs_more_than_its_class(part) for part in (*pair, module.lora_dropout[name])):
            return ModuleProjection(module, "its adapter has hooks, which only its module runs")
        adapters.append(_read_adapter(module, name, reading, slot * 8 + index))
    return LinearProjection(weight, _bias(base), tuple(adapters))


def _read_adapter(module: Any, name: str, reading: Reading, slot: int) -> Adapter:
    a, b, drop = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    rate = drop.p if reading.training and isinstance(drop, nn.Dropout) and drop.training else 0.0
    return Adapter(a.weight, b.weight, module.scaling[name], rate, reading.seed + slot, b.bias)


def read_norm(module: nn.Module, offset: float) -> Norm:
    """An RMSNorm module. Transformers calls the epsilon `variance_epsilon` or `eps`."""
    module = active_module(module)
    eps = getattr(module, "variance_epsilon", None)
    return Norm(module.weight, float(eps if eps is not None else module.eps), offset)  # type: ignore[arg-type]


def dropout_seed(training: bool) -> int:
    """A seed for a forward's adapter dropout, drawn from torch's CPU generator so that checkpoints reproduce it."""
    return int(torch.randint(0, 2**31 - 65536, (1,)).item()) if training else 0
