"""A layer's live experts and router, read within PEFT's wrappers of their parameters.

PEFT adapts stacked parameters by wrapping the module that holds them, once for each: `ParamWrapper(down_proj,
base_layer=ParamWrapper(gate_up_proj, base_layer=experts))`. Its matrices are read here as they lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pronghorn.blocks import Adapter, LinearProjection
from pronghorn.blocks.moe import ExpertAdapter, ExpertProjection
from pronghorn.engine.read import active_module, runs_more_than_its_class
from pronghorn.families import DecoderFamily, MixtureParts
from pronghorn.weights.base import DenseWeight
from pronghorn.weights.experts import ExpertWeight, read_experts

STACKS = ("gate_up_proj", "down_proj")


def read_stacks(module: Any, transposed: bool) -> tuple[ExpertProjection, ExpertProjection]:
    """gate and up, and down, of a module of experts, possibly wrapped by PEFT."""
    experts = innermost(module)
    found = []
    for name in STACKS:
        weight = read_experts(experts, name, transposed)
        adapters = [
            adapter for w in _wrappers(module, name) for adapter in _stacked_adapters(w, weight.shape[0])
        ]
        found.append(ExpertProjection(weight, experts._parameters.get(f"{name}_bias"), adapters))
    return found[0], found[1]


def adapters_of_stack(module: Any, name: str, experts: int) -> dict[str, ExpertAdapter]:
    """Every adapter of the stack `name` in a module of experts, active or not."""
    return {
        adapter: ExpertAdapter(a.weight, b.weight, scaling, experts)
        for wrapper in _all_wrappers(module, name)
        for adapter, a, b, scaling in _pairs(wrapper, wrapper.lora_A)
    }


def adapters_of_router(module: Any) -> dict[str, Adapter]:
    """Every adapter of a router's matrix, active or not."""
    return {
        adapter: Adapter(a.weight, b.weight, scaling)
        for wrapper in _all_wrappers(active_module(module), "weight")
        for adapter, a, b, scaling in _pairs(wrapper, wrapper.lora_A)
    }


def stack_ranks(layer: Any, family: DecoderFamily) -> dict[str, int]:
    """Ranks of the adapters on a layer's stacks, under the names of the projections they begin with."""
    assert family.mixture is not None
    experts = getattr(getattr(layer, family.parts.mlp), family.mixture.experts)
    stacks = read_stacks(experts, family.mixture.transposed)
    return dict(zip(("gate", "down"), (stack.total_rank for stack in stacks), strict=True))


def read_router(module: Any) -> LinearProjection:
    """A router's matrix [E, H] and bias, possibly wrapped by PEFT."""
    module = active_module(module)
    router = innermost(module)
    adapters = tuple(
        Adapter(a.weight, b.weight, scaling)
        for wrapper in _wrappers(module, "weight")
        for _, a, b, scaling in _active(wrapper)
    )
    return LinearProjection(DenseWeight(router.weight), router._parameters.get("bias"), adapters)


def read_router_bias(module: Any, name: str | None) -> Tensor | None:
    """The buffer of a router, possibly wrapped by PEFT, that decides beside the scores who is taken."""
    return None if name is None else innermost(active_module(module))._buffers[name]


@dataclass(frozen=True)
class ReadMixture:
    """The experts' weights of all layers, and what `describe` says of them."""

    weights: list[ExpertWeight]
    lines: list[str]


def read_mixture(family: DecoderFamily, config: Any, layers: Iterable[Any]) -> ReadMixture:
    """The mixtures of a model's layers that have one; nothing of a family without."""
    mixture = family.mixture
    if mixture is None:
        return ReadMixture([], [])
    stacks = [
        stack
        for layer in layers
        for stack in read_stacks(
            getattr(getattr(layer, family.parts.mlp), mixture.experts), mixture.transposed
        )
    ]
    scoring, weights = mixture.scoring(config), [stack.weight for stack in stacks]
    stored = ", ".join(sorted({weight.storage for weight in weights}))
    adapted = sum(stack.total_rank > 0 for stack in stacks)
    line = f"  experts: {scoring.top_k} of {scoring.experts} a token in {len(stacks) // 2} layers, {stored}"
    return ReadMixture(weights, [f"{line}; adapters on {adapted} of {len(stacks)} stacks"])


def innermost(module: Any) -> Any:
    """The module within PEFT's wrappers of its parameters."""
    while _wraps(module):
        module = module._modules["base_layer"]
    return module


def mixture_classes(mlp: Any, prefix: str, mixture: MixtureParts) -> dict[str, str]:
    """The classes of a mixture that the fast path was reviewed for, and those of `mlp`."""
    router, experts = (getattr(mlp, name, None) for name in (mixture.router, mixture.experts))
    parts = {
        mixture.block: mlp,
        mixture.router_class: None if router is None else innermost(active_module(router)),
        mixture.experts_class: innermost(experts),
    }
    return {f"{prefix}{name}": type(part).__name__ for name, part in parts.items()}


def why_stock_experts(mlp: Any, mixture: MixtureParts) -> str | None:
    """Why only the stock forward can run a mixture, or None."""
    for name in (mixture.experts, mixture.router, mixture.shared):
        if name is None or name not in mlp._modules:  # a dense layer in between
            return None
        module = active_module(mlp._modules[name])
        while True:
            if runs_more_than_its_class(module):
                return f"{name} has hooks or a forward of its own"
            if not _wraps(module):
                break
            if module.disable_adapters and module.merged:
                return f"{name} has an adapter that is merged but switched off: PEFT has to unmerge it first"
            module = module._modules["base_layer"]
        if "base_layer" in module._modules:
            return f"{name} is wrapped in a {type(module).__name__}"
    return None


def _wraps(module: Any) -> bool:
    return type(module).__name__ == "ParamWrapper"


def _wrappers(module: Any, parameter: str) -> Iterator[Any]:
    """The wrappers of one parameter that are switched on."""
    for wrapper in _all_wrappers(module, parameter):
        if not wrapper.disable_adapters and not wrapper.merged:
            yield wrapper


def _all_wrappers(module: Any, parameter: str) -> Iterator[Any]:
    """The wrappers of one parameter."""
    while _wraps(module):
        if module.parameter_name == parameter:
            yield module
        module = module._modules["base_layer"]


def _active(wrapper: Any) -> Iterator[tuple[str, nn.Linear, nn.Linear, float]]:
    """Name, A, B and scaling of each active adapter."""
    return _pairs(wrapper, wrapper.active_adapters)


def _pairs(wrapper: Any, names: Iterable[str]) -> Iterator[tuple[str, nn.Linear, nn.Linear, float]]:
    """Name, A, B and scaling of those adapters that the wrapper has."""
    for name in names:
        if name in wrapper.lora_A:
            yield name, wrapper.lora_A[name], wrapper.lora_B[name], wrapper.scaling[name]


def _stacked_adapters(wrapper: Any, experts: int) -> Iterator[ExpertAdapter]:
    for _, a, b, scaling in _active(wrapper):
        yield ExpertAdapter(a.weight, b.weight, scaling, experts)
