"""What plans want to know of the groups of projections of a model's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pronghorn.blocks import LinearProjection
from pronghorn.blocks.projection import ProjectionGroup, rows_are_independent
from pronghorn.engine.joined import joins, weights_to_join
from pronghorn.weights import stacked


def adapted_products(
    read: Sequence[Mapping[int, Sequence[Any]]], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Which products in 16 bits add adapters and residuals themselves in all layers."""

    def everywhere(slot: int, suits: Callable[[ProjectionGroup], bool]) -> bool:
        return all(slot in found and suits(ProjectionGroup(found[slot])) for found in read)

    firsts = ((0, "q"), (3, "o"), (4, "gate"), (6, "down"))
    return {
        "residual_in_o": everywhere(3, lambda group: group.suits_onto(device, dtype)),
        "whole_input_grads": tuple(
            name
            for slot, name in firsts
            if everywhere(slot, lambda group: group.suits_whole_input_grad(device, dtype))
        ),
    }


def keeps_rows_together(groups: Mapping[int, Sequence[Any]]) -> bool:
    """Whether a layer has an adapter whose blocks do not run over tiles of rows."""
    linear = [p for group in groups.values() for p in group if isinstance(p, LinearProjection)]
    trained = [a.a for projection in linear for a in projection.adapters if a.a.requires_grad]
    return not rows_are_independent(linear, trained)


def lies_joined(groups: Mapping[int, Sequence[Any]], device: torch.device, laid_out: bool) -> bool:
    """Whether the weights of a layer's groups lie side by side, or will in a training step."""
    for slot in {0, 4} & {*groups}:
        weights = [p.weight for p in groups[slot] if isinstance(p, LinearProjection)]
        whole = len(weights) == len(groups[slot])
        will = not laid_out and joins(device) and weights_to_join(slot, groups[slot])
        if not (whole and stacked(weights)) and not will:
            return False
    return True
