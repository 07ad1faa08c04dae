"""Matrix products of rows sorted by group with one matrix a group: the experts of a mixture.

For S rows, sorted so that those of expert e lie together, and stacked weights W [E, N, K]:

    forward          y[s]  = x[s] W[e(s)]ᵀ + left[s] right[e(s)]ᵀ      x [S, K],  y [S, N]
    input gradient   dx[s] = dy[s] W[e(s)] + left[s] right[e(s)]       dy [S, N], dx [S, K]
    weight gradient  G[e]  = Σ_{s of e} left[s]ᵀ right[s]              left [S, M], right [S, N], G [E, M, N]

left [S, R] and right are an adapter's factors, added where the product is written. How many rows an expert has is
known on the device alone: shapes depend on S and E, nothing waits for a count, and a CUDA graph can hold it all.
Experts without rows, and one with all of them, are ordinary cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, math_dtype, use_triton


@dataclass(frozen=True)
class Groups:
    """Which rows are whose: `experts` [S] ascending, int64; `count` experts in all. `known_ends`: `ends`, where they
    are known already."""

    experts: Tensor
    count: int
    known_ends: Tensor | None = None

    @cached_property
    def ends(self) -> Tensor:
        """[E] int32: the rows of e are ends[e - 1] to ends[e] - 1."""
        if self.known_ends is not None:
            return self.known_ends
        numbers = torch.arange(self.count, device=self.experts.device, dtype=self.experts.dtype)
        return torch.searchsorted(self.experts, numbers, right=True, out_int32=True)

    @cached_property
    def tiles(self) -> dict[int, Tensor]:
        """By the height of a tile: where the tiles of each group's rows begin (`kernels.triton.grouped_matmul`)."""
        return {}

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Each expert that has rows, with them. Waits for the device: for the reference alone."""
        start = 0
        for expert, end in enumerate(self.ends.tolist()):
            if end > start:
                yield expert, slice(start, end)
            start = end


@dataclass(frozen=True)
class LowRankRows:
    """An adapter's share of a grouped product: left [S, R], right [E, N, R], or [E, R, N] in a transposed one."""

    left: Tensor
    right: Tensor


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    groups: Groups,
    *,
    transposed: bool = False,
    low_rank: LowRankRows | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """x [S, K] times the matrix of each row's expert -> [S, N] in x's dtype.

    Args:
        weight: [E, N, K], or [E, K, N] with `transposed`; x's dtype.
    """
    if use_triton(x, impl):
        from pronghorn.kernels.triton.grouped_matmul import matmul

        return matmul(x, weight, groups, transposed, low_rank)
    out = x.new_zeros(x.shape[0], weight.shape[2 if transposed else 1])
    for expert, rows in groups.slices():
        part = x[rows] @ _oriented(weight[expert], transposed)
        if low_rank is not None:
            part.addmm_(low_rank.left[rows], _oriented(low_rank.right[expert], transposed))
        out[rows] = part
    return out


def grouped_outer(left: Tensor, right: Tensor, groups: Groups, *, impl: Impl | None = None) -> Tensor:
    """Σ over each expert's rows of left[s]ᵀ right[s]: left [S, M], right [S, N] -> [E, M, N] in fp32 (fp64 of fp64)."""
    if use_triton(left, impl):
        from pronghorn.kernels.triton.grouped_matmul import outer

        return outer(left, right, groups)
    wide = math_dtype(left.dtype)
    out = torch.zeros(groups.count, left.shape[1], right.shape[1], dtype=wide, device=left.device)
    for expert, rows in groups.slices():
        out[expert] = left[rows].to(wide).t() @ right[rows].to(wide)
    return out


def _oriented(matrix: Tensor, transposed: bool) -> Tensor:
    return matrix if transposed else matrix.t()
