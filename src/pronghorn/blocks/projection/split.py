"""One module for what other families have in several: Phi-3's q, k, v, or its gate and up.

    [Y_1 | Y_2 | …] = X Wᵀ + b + s · (X Aᵀ) Bᵀ        W [Σout, in], B [Σout, R], one A [R, in]

The block sees the columns as outputs of their own; the product and the adapter are one, so their gradients are those of
the columns side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pronghorn.blocks.projection.group import ProjectionGroup
from pronghorn.blocks.projection.parts import PackedAdapters, Projection
from pronghorn.kernels.dispatch import Impl
from pronghorn.kernels.lora import LowRank
from pronghorn.weights import side_by_side
from pronghorn.weights.operand import Operand


class SplitGroup(ProjectionGroup):
    """A group of one projection whose output is read as columns of `widths`."""

    def __init__(
        self,
        projection: Projection,
        widths: Sequence[int],
        packed: PackedAdapters | None = None,
        impl: Impl | None = None,
    ) -> None:
        super().__init__([projection], packed, impl)
        self.widths = list(widths)

    def forward(
        self,
        x: Tensor | Operand,
        defer_adapters: bool = False,
        xa: Tensor | None = None,
        joined: bool = False,
    ) -> tuple[list[Tensor], Tensor | None]:
        (wide,), xa = super().forward(x, defer_adapters, xa)
        return list(wide.split(self.widths, 1)), xa

    def deferred(self, i: int, xa: Tensor | None) -> LowRank | None:
        whole = super().deferred(0, xa)
        if whole is None:
            return None
        start = sum(self.widths[:i])
        return LowRank(whole.xa, whole.b[start : start + self.widths[i]], whole.scaling)

    @property
    def is_one_matrix(self) -> bool:
        return True

    def of_outputs(self, dys: list[Tensor]) -> list[Tensor]:
        wide = side_by_side(dys, 1)
        return [torch.cat(dys, 1) if wide is None else wide]
