"""Mixtral: Mistral's attention and a mixture of experts in every layer."""

from typing import Any

from pronghorn.families.mixture import MixtureParts, local_experts, mixture_everywhere, plain_gating
from pronghorn.families.spec import DecoderFamily, window_everywhere


def _unsupported(config: Any) -> str | None:
    """`router_jitter_noise`."""
    noise = config.router_jitter_noise
    return f"router_jitter_noise={noise}: its noise is drawn by the stock block" if noise else None


FAMILY = DecoderFamily(
    name="Mixtral",
    model_types=("mixtral",),
    prefix="Mixtral",
    mlp=mixture_everywhere,
    mixture=MixtureParts(local_experts, plain_gating, intermediate="intermediate_size"),
    window=window_everywhere,
    unsupported=_unsupported,
)
