"""Projections of one input as inference runs them: stored weights, and the adapter that each row asks for.

    Y_i = X W_iᵀ + b_i,   and for the rows of adapter a:   Y_i += s_a · (X A_aᵀ) B_a,iᵀ

Weights are those the trainer multiplies, in its own storage. Adapters are kept as copies in the compute dtype, the A
matrices of a group stacked, and are taken anew when their parameters have changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pronghorn.blocks import Adapter, LinearProjection, NoNorm, Norm
from pronghorn.weights import DenseWeight, Operand, Weight, join, join_tensors, side_by_side, stacked
from pronghorn.weights.operand import as_operand


@dataclass(frozen=True)
class Segment:
    """Neighbouring rows of a batch that take the same adapter."""

    adapter: str | None
    rows: slice


@dataclass(frozen=True)
class Share:
    """One adapter's part in a group: A [ΣR, in], and by projection (its number, columns of XA, s · B, bias)."""

    a: Tensor
    parts: tuple[tuple[int, slice, Tensor, Tensor | None], ...]

    @staticmethod
    def of(adapters: Mapping[int, Adapter], dtype: torch.dtype) -> Share:
        parts, start = [], 0
        for i, adapter in adapters.items():
            columns = slice(start, start + adapter.rank)
            b = (adapter.b.detach().float() * adapter.scaling).to(dtype)
            bias = None if adapter.b_bias is None else adapter.b_bias.detach().float() * adapter.scaling
            parts.append((i, columns, b, None if bias is None else bias.to(dtype)))
            start = columns.stop
        a = torch.cat([adapter.a.detach() for adapter in adapters.values()]).to(dtype)
        return Share(a, tuple(parts))

    def add_(self, outs: Sequence[Tensor], x: Tensor, rows: slice) -> None:
        """Add to the rows of the outputs."""
        xa = x[rows] @ self.a.t()
        for i, columns, b, bias in self.parts:
            out = outs[i][rows]
            out.addmm_(xa[:, columns], b.t())
            if bias is not None:
                out.add_(bias)


class Group:
    """Projections that read the same input (q, k, v; gate, up) or a single one (o; down; the head).

    Args:
        projections: what the base model multiplies, without adapters.
        adapters: by adapter name and projection.
        dtype: of products.
    """

    def __init__(
        self,
        projections: Sequence[LinearProjection],
        adapters: Mapping[str, Mapping[int, Adapter]],
        dtype: torch.dtype,
    ) -> None:
        self.weights: tuple[Weight, ...] = tuple(p.weight for p in projections)
        self.widths = [weight.shape[0] for weight in self.weights]
        self.shares = {name: Share.of(found, dtype) for name, found in adapters.items() if found}
        self.dtype = dtype
        self.stack = self.weights[0] if len(self.weights) == 1 else _laid_side_by_side(projections)
        # Now that they lie where they stay.
        self.biases = tuple(p.cast_bias(dtype) for p in projections)
        self.stacked_bias = _stacked_bias(self.biases, self.widths)
        #: the weights as one matrix in the compute dtype, where they are stored so
        self.dense: Tensor | None = None
        if type(self.stack) is DenseWeight and self.stack.weight.dtype == dtype:
            self.dense = self.stack.weight.detach()

    def forward(self, x: Tensor | Operand, segments: Sequence[Segment] = ()) -> Tensor:
        """[T, Σout]: the outputs side by side."""
        if self.dense is not None and not self.shares:
            return F.linear(x.tensor if isinstance(x, Operand) else x, self.dense, self.stacked_bias)
        operand = as_operand(x)
        if self.stack is not None:
            y = self.stack.matmul(operand, self.stacked_bias)
        else:
            pairs = zip(self.weights, self.biases, strict=True)
            y = torch.cat([weight.matmul(operand, bias) for weight, bias in pairs], 1)
        self.add_adapters_(y, operand.tensor, segments)
        return y

    def add_to_(self, out: Tensor, x: Tensor, segments: Sequence[Segment] = ()) -> Tensor:
        """out [T, out] += Y of a group of one, in place."""
        (weight,), (bias,) = self.weights, self.biases
        weight.matmul_add_(out, x)
        if bias is not None:
            out.add_(bias)
        self.add_adapters_(out, x, segments)
        return out

    def add_adapters_(self, y: Tensor, x: Tensor, segments: Sequence[Segment]) -> None:
        """Add to the rows of y [T, Σout] what their adapters give for x [T, in]."""
        for segment in segments:
            share = self.shares.get(segment.adapter) if segment.adapter is not None else None
            if share is not None:
                rows = segment.rows
                share.add_(y.split(self.widths, 1), x.to(self.dtype), rows)


@dataclass
class Table:
    """A group's adapters by slot, 0 for none: a [slots, parts · R, in], b [slots, out, R] with the scaling in it."""

    a: Tensor
    b: Tensor
    ends: tuple[int, ...]

    def tensors(self) -> tuple[Tensor, ...]:
        """What recorded steps read."""
        return self.a, self.b

    @staticmethod
    def of(group: Group, names: Sequence[str]) -> Table | None:
        """None where no adapter has a part in the group.

        Raises:
            ValueError: an adapter has a bias, which has no place in the table.
        """
        shares = {slot: group.shares[n] for slot, n in enumerate(names, start=1) if n in group.shares}
        if not shares:
            return None
        like = next(iter(shares.values()))
        rank = max(columns.stop - columns.start for s in shares.values() for _, columns, _, _ in s.parts)
        rank = 1 << max(4, (rank - 1).bit_length())
        ends = tuple(sum(group.widths[: i + 1]) for i in range(len(group.widths)))
        a = like.a.new_zeros(len(names) + 1, len(group.widths) * rank, like.a.shape[1])
        b = like.a.new_zeros(len(names) + 1, ends[-1], rank)
        for slot, share in shares.items():
            for i, columns, own, bias in share.parts:
                if bias is not None:
                    raise ValueError("an adapter's B has a bias")
                width = columns.stop - columns.start
                a[slot, i * rank : i * rank + width] = share.a[columns]
                b[slot, ends[i] - group.widths[i] : ends[i], :width] = own
        return Table(a, b, ends)


def normalised(norm: Norm | NoNorm, x: Tensor, dtype: torch.dtype, consumer: Group) -> Tensor | Operand:
    """The norm of x [T, H] in `dtype`, quantised where that is what the consumer multiplies."""
    if isinstance(norm, NoNorm):
        return x.to(dtype)
    weight = consumer.stack or consumer.weights[0]
    if x.device.type == "cpu" and not weight.quantises_rows:
        # One call of torch; a few rows at a time are bound by the number of calls.
        scale = norm.weight.detach()
        if norm.centred:
            return F.layer_norm(x, (x.shape[-1],), scale, None, norm.eps).to(dtype)
        if norm.offset:
            scale = scale.float() + norm.offset
            return F.rms_norm(x.float(), (x.shape[-1],), scale, norm.eps).to(dtype)
        return F.rms_norm(x, (x.shape[-1],), scale, norm.eps).to(dtype)
    return norm.forward(x, dtype, fp8=weight.quantises_rows, int8=weight.fuses)[0]


def _laid_side_by_side(projections: Sequence[LinearProjection]) -> Weight | None:
    """The weights as one, moved next to each other where they may be; None where they stay apart."""
    weights = [p.weight for p in projections]
    if not all(type(weight) is DenseWeight for weight in weights) or join(weights, answering=True):
        biases = [p.bias for p in projections if p.bias is not None]
        if len(biases) == len(projections) and side_by_side(biases, 0) is None:
            join_tensors(biases, answering=True)
        return stacked(weights, answering=True)
    return None


def _stacked_bias(biases: Sequence[Tensor | None], widths: Sequence[int]) -> Tensor | None:
    """[Σout], zero where a projection has none; None where none has one."""
    present = [bias for bias in biases if bias is not None]
    if not present:
        return None
    if len(present) == len(biases) and (whole := side_by_side(present, 0)) is not None:
        return whole
    parts = [present[0].new_zeros(width) if b is None else b for b, width in zip(biases, widths, strict=True)]
    return torch.cat(parts)
