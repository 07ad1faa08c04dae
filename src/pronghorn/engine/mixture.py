"""From a layer's live mixture of experts, its PEFT wrappers included, to the block that computes it.

PEFT adapts stacked parameters by wrapping the module that holds them, once for each: `ParamWrapper(down_proj,
base_layer=ParamWrapper(gate_up_proj, base_layer=experts))`. Its matrices are read here as they lie.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pronghorn.blocks import Adapter, LinearProjection, ProjectionGroup
from pronghorn.blocks.moe import ExpertAdapter, ExpertProjection, MoeBlock, RouterBalance, SharedExpert
from pronghorn.engine.read import active_module, read_norm, runs_more_than_its_class
from pronghorn.families import MOE, DecoderFamily, MixtureParts
from pronghorn.weights.base import DenseWeight
from pronghorn.weights.experts import ExpertWeight, read_experts

if TYPE_CHECKING:
    from pronghorn.engine.binding import Binding
    from pronghorn.engine.forward import LayerCall, ReadGroups

STACKS = ("gate_up_proj", "down_proj")


def moe_block(layer: Any, call: LayerCall, read: ReadGroups) -> MoeBlock:
    """The second half of a layer whose MLP is a mixture of experts."""
    binding = call.binding
    parts, mixture = binding.family.parts, binding.family.mixture
    assert mixture is not None
    mlp = getattr(layer, parts.mlp)
    experts = getattr(mlp, mixture.experts)
    gate_up, down = read_stacks(experts, mixture.transposed)
    tiles = {} if binding.tile_rows is None else {"tile_tokens": binding.tile_rows}
    return MoeBlock(
        norm=read_norm(getattr(layer, parts.mlp_norm), binding.family.norm_offset),
        router=ProjectionGroup([read_router(getattr(mlp, mixture.router))]),
        scoring=mixture.scoring(binding.config),
        gate_up=gate_up,
        down=down,
        gating=mixture.gating(innermost(experts), binding.activation),
        balance=call.balance,
        shared=None if mixture.shared is None else _shared_expert(read, binding.activation),
        **tiles,
    )


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
        for a, b, scaling in _active(wrapper)
    )
    return LinearProjection(DenseWeight(router.weight), router._parameters.get("bias"), adapters)


def _shared_expert(read: ReadGroups, activation: str) -> SharedExpert:
    groups = {slot: ProjectionGroup(found, packed) for slot, (found, packed) in read.items()}
    return SharedExpert(groups[4], groups[6], activation, groups.get(7))


@dataclass(frozen=True)
class ReadMixture:
    """The experts' weights of all layers, and what `describe` says of them."""

    weights: list[ExpertWeight]
    lines: list[str]


def read_mixture(binding: Binding) -> ReadMixture:
    """The mixtures of a bound model; nothing of one without."""
    family, mixture = binding.family, binding.family.mixture
    if mixture is None:
        return ReadMixture([], [])
    stacks = [
        stack
        for layer in binding.layers
        if binding.mlp_of(layer) == MOE
        for stack in read_stacks(
            getattr(getattr(layer, family.parts.mlp), mixture.experts), mixture.transposed
        )
    ]
    scoring, weights = mixture.scoring(binding.config), [stack.weight for stack in stacks]
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
    while _wraps(module):
        if module.parameter_name == parameter and not module.disable_adapters and not module.merged:
            yield module
        module = module._modules["base_layer"]


def _active(wrapper: Any) -> Iterator[tuple[nn.Linear, nn.Linear, float]]:
    """A, B and scaling of each active adapter."""
    for name in wrapper.active_adapters:
        if name in wrapper.lora_A:
            yield wrapper.lora_A[name], wrapper.lora_B[name], wrapper.scaling[name]


def _stacked_adapters(wrapper: Any, experts: int) -> Iterator[ExpertAdapter]:
    for a, b, scaling in _active(wrapper):
        yield ExpertAdapter(a.weight, b.weight, scaling, experts)


# --- the auxiliary loss ----------------------------------------------------------------------------------------

#: under which a `RouterBalance` comes to the decoder
BALANCE = "pronghorn_balance"


def balance_of(binding: Binding, labels: Tensor, kwargs: dict[str, Any]) -> RouterBalance | None:
    """Where routers are to take down what they do, or None where nobody asks for it.

    Of a packed stream the tokens count whose documents somebody learns from: others may be there to fill it up.
    """
    asked = kwargs.get("output_router_logits")
    wanted = getattr(binding.config, "output_router_logits", False) if asked is None else asked
    if binding.family.mixture is None or not wanted:
        return None
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None:
        return RouterBalance()
    supervised = labels.reshape(-1) != -100
    tokens = torch.arange(supervised.numel(), device=bounds.device, dtype=bounds.dtype)
    documents = torch.searchsorted(bounds[1:].contiguous(), tokens, right=True)
    learned = torch.zeros(bounds.numel(), device=bounds.device).scatter_add_(0, documents, supervised.float())
    return RouterBalance(learned[documents] > 0)


def with_balance(
    model: Any,
    balance: RouterBalance,
    loss: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None,
    router_logits: Any,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss with the balance of experts added, and the balance L.

        loss + router_aux_loss_coef · L · (supervised tokens here / num_items_in_batch)

    so that the parts of a step weigh as their tokens do, and a step's weights add up to one.

    Args:
        router_logits: of all layers, where the stock decoder ran.
    """
    share: Tensor | float = 1.0
    if num_items_in_batch is not None:
        share = (labels[:, 1:] != -100).sum() / num_items_in_batch
    weight = model.config.router_aux_loss_coef * share
    if not router_logits:
        return balance.added_to(loss, weight), balance.loss()
    stock = sys.modules[type(model).__module__].load_balancing_loss_func
    mixture = model.pronghorn_binding.family.mixture
    scoring = mixture.scoring(model.config)
    found = stock(router_logits, scoring.experts, scoring.top_k, attention_mask)
    return loss + weight * found.to(loss.device), found
