"""From live Transformers and PEFT modules to the blocks' projections and norms.

Modules are read at every forward, so that an adapter added, switched off, merged or replaced later is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.blocks import Adapter, LinearProjection, ModuleProjection, NoNorm, Norm
from pronghorn.blocks.projection import Projection
from pronghorn.families import MOE, LayerParts, MixtureParts
from pronghorn.weights import read_weight
from pronghorn.weights.experts import runs_its_own_forward

#: numbers that a layer's dropout masks have to themselves: 16 slots of 8 adapters
SEEDS_OF_LAYER = 128


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
    if "base_layer" not in module._modules:
        weight = read_weight(module)
        if weight is None:
            return ModuleProjection(
                module, f"{type(module).__name__} is not a linear layer the blocks can read"
            )
        return LinearProjection(weight, _bias(module))
    return _read_peft(module, reading, slot)


def group_names(
    parts: LayerParts, mlp: str = "glu", mixture: MixtureParts | None = None
) -> dict[int, tuple[str, tuple[str, ...]]]:
    """The modules of a layer that share their input, with their parent, by the slot of the first: q k v at 0, o at 3,
    gate and up at 4, down at 6, the gate of a shared expert at 7, at 8 and 9 what makes q and k, v of codes, from 10
    on what a recurrence reads its input with. A kind of MLP other than "glu" reads its own weights, but for a mixture's
    shared expert."""
    gate_up, down = parts.mlp_projections
    found = {slot: (parts.attention, names) for slot, names in parts.attention_projections.items()}
    if mlp == "glu":
        return found | {4: (parts.mlp, gate_up), 6: (parts.mlp, down)}
    if mlp == MOE and mixture is not None and mixture.shared is not None:
        shared = f"{parts.mlp}.{mixture.shared}"
        found |= {4: (shared, gate_up), 6: (shared, down)}
        found |= {7: (parts.mlp, (mixture.shared_gate,))} if mixture.shared_gate is not None else {}
    return found


def read_groups(
    layer: Any,
    parts: LayerParts,
    reading: Reading,
    mlp: str = "glu",
    mixture: MixtureParts | None = None,
) -> dict[int, list[Projection]]:
    """A layer's projections by the slots of `group_names`."""
    found = {}
    for slot, (path, names) in group_names(parts.of(layer), mlp, mixture).items():
        # Once a group: nn.Module's look-ups, for every layer of every step, cost milliseconds.
        parent = layer.get_submodule(path)
        found[slot] = [
            read_projection(getattr(parent, name), reading, slot + i) for i, name in enumerate(names)
        ]
    return found


def _bias(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


_COLLECTING = "transformers.utils.output_capturing"
#: where the functions are defined that mixed precision wraps a forward in
_PRECISION = ("accelerate.utils.operations", "torch.amp.autocast_mode")


def runs_more_than_its_class(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: hooks, or a forward put on the instance.

    accelerate's own replacement of `forward` moves inputs between devices; a bound model lies on one. Transformers
    leaves a hook behind wherever it has once collected hidden states, which does nothing in later calls. Experts that
    are held in 4 bits have a forward that dequantises them for their class's.
    """
    own = (
        module.__dict__
    )  # read for every module of every step: nn.Module's attribute lookup is several times slower
    return bool(
        (own["_forward_hooks"] and any(map(_is_not_collecting, own["_forward_hooks"].values())))
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or ("forward" in own and "_hf_hook" not in own and not runs_its_own_forward(module))
    )


def runs_more_than_the_binding(module: nn.Module) -> bool:
    """`runs_more_than_its_class` for a module whose forward a binding has put on the instance; hooks of backward passes
    apart."""
    own = module.__dict__
    return bool(
        any(map(_is_not_collecting, own["_forward_hooks"].values()))
        or own["_forward_pre_hooks"]
        or has_forward_of_its_own(module)
    )


def has_forward_of_its_own(module: nn.Module) -> bool:
    """Whether somebody has put a forward on the instance; bindings, accelerate and mixed precision apart."""
    own = module.__dict__
    if "forward" not in own or "_hf_hook" in own:
        return False
    forward = _within_precision(own["forward"])
    if isinstance(forward, partial):
        return bool(forward.func.__module__ != f"{__package__}.forward")
    return forward is not type(module).forward


def _within_precision(forward: Any) -> Any:
    """The forward that accelerate has wrapped for mixed precision, once for each trainer; any other as it is."""
    while True:
        forward = getattr(forward, "__func__", forward)
        place = getattr(forward, "__globals__", {}).get("__name__", type(forward).__module__)
        if place not in _PRECISION or not hasattr(forward, "__wrapped__"):
            return forward
        forward = forward.__wrapped__


def _is_not_collecting(hook: Any) -> bool:
    return getattr(hook, "__module__", None) != _COLLECTING


def active_module(module: nn.Module) -> nn.Module:
    """The module that really runs: PEFT's trained copy of a `modules_to_save` entry, or the module itself."""
    children = module._modules
    if "modules_to_save" not in children or "original_module" not in children:
        return module
    copies = children["modules_to_save"]
    if module.disable_adapters or module.active_adapters[0] not in copies:  # type: ignore[index, operator]
        return module.original_module  # type: ignore[return-value]
    return copies[module.active_adapters[0]]  # type: ignore[index, no-any-return, operator]


def _read_peft(module: Any, reading: Reading, slot: int) -> Projection:
    children = module._modules
    base = children["base_layer"]
    if runs_more_than_its_class(base):
        return ModuleProjection(
            module, "its base layer has hooks or a forward of its own, which only its module runs"
        )
    weight = read_weight(base)
    if weight is None:
        return ModuleProjection(module, f"{type(base).__name__} is not a linear layer the blocks can read")
    if "lora_A" not in children:
        return ModuleProjection(module, f"{type(module).__name__} is an adapter the blocks do not know")
    if module.disable_adapters and module.merged:
        return ModuleProjection(
            module, "its adapter is merged but switched off: PEFT has to unmerge it first"
        )
    if module.disable_adapters or module.merged:
        return LinearProjection(weight, _bias(base))
    adapters = []
    all_a, all_b = children["lora_A"]._modules, children["lora_B"]._modules
    dropouts, variants = children["lora_dropout"]._modules, module.lora_variant
    for index, name in enumerate(module.active_adapters):
        if name not in children["lora_A"]:  # type: ignore[operator]
            continue
        if name in variants:
            variant = type(variants[name]).__name__.removesuffix("LinearVariant")
            return ModuleProjection(module, f"the adapter is a {variant} variant, which PEFT computes")
        a, b, drop = all_a.get(name), all_b.get(name), dropouts[name]
        if not (isinstance(a, nn.Linear) and isinstance(b, nn.Linear)):
            return ModuleProjection(module, f"the adapter of {type(module).__name__} is no pair of matrices")
        if runs_more_than_its_class(a) or runs_more_than_its_class(b) or runs_more_than_its_class(drop):
            return ModuleProjection(module, "its adapter has hooks, which only its module runs")
        rate = drop.p if reading.training and isinstance(drop, nn.Dropout) and drop.training else 0.0
        seed = reading.seed + slot * 8 + index
        adapters.append(Adapter(a.weight, b.weight, module.scaling[name], rate, seed, b.bias))
    return LinearProjection(weight, _bias(base), tuple(adapters))


def read_norm(module: nn.Module, offset: float) -> Norm:
    """An RMSNorm module, or a LayerNorm without bias, by its class's name. Transformers calls the epsilon
    `variance_epsilon` or `eps`."""
    module = active_module(module)
    eps = getattr(module, "variance_epsilon", None)
    centred = type(module).__name__.endswith("LayerNorm")
    return Norm(module.weight, float(eps if eps is not None else module.eps), offset, centred)  # type: ignore[arg-type]


def read_norm_before(layer: nn.Module, name: str | None, offset: float) -> Norm | NoNorm:
    """The norm of that name in front of a layer's attention or MLP, where there is one."""
    return NoNorm() if name is None else read_norm(getattr(layer, name), offset)


def dropout_seed(training: bool) -> int:
    """A seed for a forward's adapter dropout, drawn from torch's CPU generator so that checkpoints reproduce it."""
    return int(torch.randint(0, 2**31 - 65536, (1,)).item()) if training else 0
