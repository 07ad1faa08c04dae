"""How a family's layers with a mixture of experts are laid out: which submodule plays which part, and the router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pronghorn.kernels.grouped_glu import Gating
from pronghorn.kernels.routing import Scoring

#: `DecoderFamily.mlp` of a layer that is a mixture of experts
MOE = "moe"


@dataclass(frozen=True)
class MixtureParts:
    """Paths inside the MLP of such a layer, and the classes that the fast path was reviewed for.

    Experts are one module with stacked parameters `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].

    Args:
        block: class of the layer's MLP; `experts_class` and `router_class` of its parts, all after the family's prefix.
        router_bias: the router's buffer that is added to scores for the choice of experts alone.
        shared, shared_gate: the expert of every token and the gate of its output, None where there is none.
        transposed: the stacks are [E, in, out].
        intermediate: the config's key for I of a routed expert. `shared_intermediate`: I of the shared one, by config.
        balanced: whether Transformers adds the balance of experts to the loss where `output_router_logits` asks for it.
        scoring: what the router computes, by config.
        gating: what experts compute of gate and up, by their module and the activation's name in `kernels.glu`.
    """

    scoring: Callable[[Any], Scoring]
    gating: Callable[[Any, str], Gating]
    block: str = "SparseMoeBlock"
    experts_class: str = "Experts"
    router_class: str = "TopKRouter"
    router: str = "gate"
    router_bias: str | None = None
    experts: str = "experts"
    shared: str | None = None
    shared_gate: str | None = None
    transposed: bool = False
    intermediate: str = "moe_intermediate_size"
    shared_intermediate: Callable[[Any], int] | None = None
    balanced: bool = True


def mixture_everywhere(config: Any, layer_index: int) -> str:
    """A mixture of experts in every layer."""
    return MOE


def local_experts(config: Any) -> Scoring:
    """Weights that add up to one, under the config's keys of Mixtral."""
    return Scoring(config.num_local_experts, config.num_experts_per_tok)


def plain_gating(experts: Any, activation: str) -> Gating:
    """act(gate) · up, gate and up one after the other."""
    return Gating(activation)
