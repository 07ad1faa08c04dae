"""Where the products around a gated unit make and differentiate it themselves (`kernels.glu_products`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pronghorn.blocks import joining
from pronghorn.blocks.projection import AdapterGrads, PackedAdapters, Projection, ProjectionGroup
from pronghorn.kernels import glu_products, tiles
from pronghorn.kernels.glu_products import DownGrad, GateUp


def takes_gate_up(group: ProjectionGroup, rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether gate and up of so many rows come complete from one product, adapters included."""
    weights = _ready_weights(group, dtype)
    if weights is None or not tiles.aligned(*weights) or not suits(group, rows.device, dtype):
        return False
    return tiles.fills(rows.shape[0], weights[0].shape[0], glu_products.HALF)


def suits(group: ProjectionGroup, device: torch.device, dtype: torch.dtype) -> bool:
    """`takes_gate_up`, wherever the weights may lie and however many rows there are."""
    if not joining.GATED_IN_PRODUCTS or tiles.why_not(device, dtype) is not None:
        return False
    if group.is_one_matrix or len(group.weights()) != 2 or group.has_biases():
        return False
    shares = group.one_share_each()
    if shares is None:
        return not group.total_rank
    (rank, other), (scaling, others) = shares
    return rank == other and scaling == others and rank in glu_products.RANKS


def suits_block(groups: Mapping[int, Sequence[Projection]], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether both products around the unit of a layer may take it, wherever the weights lie. Of its groups gate and
    up are the one in slot 4, down is that in slot 6."""
    if 4 not in groups or 6 not in groups:
        return False
    return suits(ProjectionGroup(groups[4]), device, dtype) and suits_down(ProjectionGroup(groups[6]))


def suits_down(group: ProjectionGroup) -> bool:
    """Whether the down projection's adapter is one that `takes_down` takes."""
    rank = group.total_rank
    return (
        len(group.weights()) == 1
        and not group.has_biases()
        and _takes_rank(rank)
        and bool(group.one_share_each())
    )


def takes_down(group: ProjectionGroup, packed: PackedAdapters, dy: Tensor) -> bool:
    """Whether the down projection's input gradient goes through the activation in one product; its adapter is
    `packed`."""
    weights = _ready_weights(group, dy.dtype)
    if weights is None or not joining.GATED_IN_PRODUCTS or not suits_down(group):
        return False
    fits = packed.a.dtype == dy.dtype and tiles.aligned(weights[0], packed.a, dy)
    fits = fits and tiles.fills(dy.shape[0], weights[0].shape[1], tiles.COLUMNS)
    return fits and tiles.why_not(dy.device, dy.dtype) is None


def a_of_down(group: ProjectionGroup, rows: Tensor) -> Tensor | None:
    """A [R, I] of the down projection, where the product that makes act can multiply it; as many `rows` as act has."""
    a = group.a_for_producer(rows)
    if a is None or not _takes_rank(a.shape[0]) or a.dtype != rows.dtype or not tiles.aligned(a):
        return None
    return a


def _takes_rank(rank: int) -> bool:
    return 0 < rank <= glu_products.MOST_RANK_DOWN and rank % 8 == 0


def call_of(
    group: ProjectionGroup, x: Tensor, xa: Tensor | None, activation: str, a: Tensor | None, keep: bool
) -> GateUp:
    """The product's operands; XA is scaled on the way."""
    gate, up = (weight for weight in _ready_weights(group, x.dtype) or ())
    if xa is None:
        return GateUp(x, gate, up, activation, a=a, keep=keep)
    shares = [group.share(i, xa) for i in range(2)]
    scaling, (gate_b, up_b) = shares[0].scaling, (share.b.contiguous() for share in shares)
    scaled = xa if scaling == 1.0 else xa * scaling
    return GateUp(x, gate, up, activation, scaled, gate_b, up_b, a, keep)


def through_activation_(
    group: ProjectionGroup,
    packed: PackedAdapters,
    dy: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    grads: AdapterGrads,
) -> None:
    """gate and up become their gradients; the down projection's A takes its own in."""
    weights = _ready_weights(group, dy.dtype)
    assert weights is not None
    glu_products.down_backward_(
        DownGrad(dy, weights[0], gate, up, activation, grads.dxa, packed.a, packed.a_grad)
    )


def _ready_weights(group: ProjectionGroup, dtype: torch.dtype) -> list[Tensor] | None:
    """The weights, where they lie as they are multiplied."""
    found = [ready for weight in group.weights() if (ready := weight.ready(dtype)) is not None]
    return found if len(found) == len(group.projections) else None
