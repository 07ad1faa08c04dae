"""Products that add an adapter's share and a residual where they write their result (`Weight.fuses`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pronghorn.blocks.projection.parts import LinearProjection, Projection
from pronghorn.kernels.lora import LowRank
from pronghorn.weights.operand import Operand

#: highest rank that is added so; of a group's input gradient the sum of its ranks
FUSED_RANK = 64


def all_fuse(projections: Sequence[Projection]) -> bool:
    """Whether every projection is a weight whose product adds."""
    return all(isinstance(p, LinearProjection) and p.weight.fuses for p in projections)


def sum_of_products(terms: Sequence[tuple[Projection, Operand]], low_rank: LowRank | None) -> Tensor:
    """Σ_i dY_i W_i + low_rank: one launch a term, each added to the one before."""
    dx: Tensor | None = None
    for projection, operand in terms:
        assert isinstance(projection, LinearProjection)
        dx = projection.weight.matmul_t_fused(operand, low_rank if dx is None else None, dx)
    assert dx is not None
    return dx
