"""Mixtral: Mistral's attention and a mixture of experts in every layer."""

from typing import Any

from pronghorn.families.mixture import MOE, MixtureParts, plain_gating
from pronghorn.families.spec import DecoderFamily, window_everywhere
from pronghorn.kernels.routing import Scoring


def _mlp(config: Any, layer_index: int) -> str:
    return MOE


def _scoring(config: Any) -> Scoring:
    return Scoring(config.num_local_experts, config.num_experts_per_tok)


def _unsupported(config: Any) -> str | None:
    """`router_jitter_noise`."""
    noise = config.router_jitter_noise
    return f"router_jitter_noise={noise}: its noise is drawn by the stock block" if noise else None


FAMILY = DecoderFamily(
    name="Mixtral",
    model_types=("mixtral",),
    prefix="Mixtral",
    mlp=_mlp,
    mixture=MixtureParts(_scoring, plain_gating, intermediate="intermediate_size"),
    window=window_everywhere,
    unsupported=_unsupported,
)
