"""A layer's mixture of experts as inference runs it: every row may take an adapter of its own.

    n = norm(x);   (e_j, w_j) = route(n Wrᵀ)
    out = x + Σ_j down_{e_j}(w_j · act(gate_up_{e_j}(n))) + σ(n wᵀ) · shared(n)

The T · k pairs of a token and an expert lie sorted by expert (`kernels.routing`); shapes are static and nothing waits
for a count, so a recorded step holds it. The adapters of a stack lie side by side along their ranks, and a row's
product with all their A keeps the columns of its own adapter alone:

    y[s] = x[s] W[e]ᵀ + (x[s] A[e]ᵀ · keep[slot(s)]) B[e]ᵀ
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pronghorn.blocks.moe import ExpertAdapter
from pronghorn.inference.projections import Group
from pronghorn.kernels.glu import glu_forward
from pronghorn.kernels.grouped_glu import Gating, grouped_glu_forward
from pronghorn.kernels.grouped_matmul import Groups, LowRankRows, grouped_matmul
from pronghorn.kernels.grouped_rows import gather_rows, spread_rows
from pronghorn.kernels.routing import Routing, Scoring
from pronghorn.weights.experts import ExpertWeight, FourBitExperts

#: (a group, its input [T, in]) -> [T, Σout], with the adapters that the rows ask for
Project = Callable[[Group, Tensor], Tensor]

#: ranks of all adapters up to which a product adds their share where it is written
MOST_FUSED_RANK = 64


@dataclass(frozen=True)
class ExpertTable:
    """The adapters of a stack side by side: a [E, ΣR, in], b [E, out, ΣR] with the scaling in it; keep [slots, ΣR] is 1
    for the ranks that belong to a slot's adapter, slot 0 having none."""

    a: Tensor
    b: Tensor
    keep: Tensor

    @staticmethod
    def of(
        adapters: Mapping[str, ExpertAdapter], names: Sequence[str], dtype: torch.dtype
    ) -> ExpertTable | None:
        """None where no adapter has a part in the stack."""
        found = [(slot, adapters[name]) for slot, name in enumerate(names, start=1) if name in adapters]
        if not found:
            return None
        a = torch.cat([adapter.stacked_a().to(dtype) for _, adapter in found], 1)
        b = torch.cat([adapter.stacked_b(dtype) for _, adapter in found], 2)
        keep = torch.zeros(len(names) + 1, a.shape[1], dtype=dtype)
        start = 0
        for slot, adapter in found:
            keep[slot, start : start + adapter.rank] = 1
            start += adapter.rank
        return ExpertTable(a, b, keep.to(a.device))

    def tensors(self) -> tuple[Tensor, ...]:
        """What recorded steps read."""
        return self.a, self.b, self.keep


class ExpertStack:
    """One projection of all experts: weights [E, out, in], biases [E, out], adapters."""

    def __init__(self, weight: ExpertWeight, bias: Tensor | None, table: ExpertTable | None) -> None:
        self.weight, self.table = weight, table
        self.bias = None if bias is None else bias.detach()

    def forward(
        self, x: Tensor, routing: Routing, slots: Tensor | None, bias_weights: Tensor | None = None
    ) -> Tensor:
        """[S, out] of x [S, in] in the order of `routing`.

        Args:
            slots: [T] the adapter's slot of each token; None: no token has one.
            bias_weights: [S], factors of the bias.
        """
        groups, transposed = routing.groups, self.weight.transposed
        stack, of_rows = self._stack(x, groups)
        fused: LowRankRows | None = None
        added: Tensor | None = None
        if self.table is not None and slots is not None:
            xa = grouped_matmul(x, self.table.a, groups)
            xa *= self.table.keep[slots[routing.tokens]]
            if of_rows is groups and xa.shape[1] <= MOST_FUSED_RANK:
                fused = LowRankRows(xa, self.table.b.transpose(1, 2) if transposed else self.table.b)
            else:
                added = grouped_matmul(xa, self.table.b, groups)
        y = grouped_matmul(x, stack, of_rows, transposed=transposed, low_rank=fused)
        if added is not None:
            y += added
        if self.bias is not None:
            rows = self.bias[groups.experts]
            y += rows if bias_weights is None else (rows * bias_weights[:, None]).to(y.dtype)
        return y

    def _stack(self, x: Tensor, groups: Groups) -> tuple[Tensor, Groups]:
        """The matrices and which rows take which: of few rows in 4 bits only the experts that they go to."""
        rows = x.shape[0]
        if isinstance(self.weight, FourBitExperts) and rows < groups.count and self.weight.has_whole_blocks:
            numbers = torch.arange(rows, device=x.device)
            return self.weight.dense_of(groups.experts, x.dtype), Groups(numbers, rows)
        return self.weight.dense(x.dtype), groups


@dataclass(frozen=True)
class GatedMlp:
    """gate, up and down."""

    gate_up: Group
    down: Group

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.gate_up, self.down


@dataclass(frozen=True)
class SharedExpert:
    """The expert of every token, and the gate of its output where the family has one."""

    mlp: GatedMlp
    gate: Group | None

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.mlp.groups if self.gate is None else (*self.mlp.groups, self.gate)

    def forward(self, normed: Tensor, activation: str, project: Project) -> Tensor:
        """[T, H] -> [T, H]."""
        gate, up = project(self.mlp.gate_up, normed).chunk(2, 1)
        out = project(self.mlp.down, glu_forward(gate, up, activation))
        return out if self.gate is None else out.mul_(torch.sigmoid(project(self.gate, normed)))


@dataclass(frozen=True)
class Mixture:
    """Router, experts and shared expert of a layer; `router_bias` [E] is added to scores for the choice alone."""

    router: Group
    scoring: Scoring
    router_bias: Tensor | None
    gate_up: ExpertStack
    down: ExpertStack
    gating: Gating
    activation: str
    shared: SharedExpert | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.router,) if self.shared is None else (self.router, *self.shared.groups)

    @property
    def tables(self) -> list[ExpertTable]:
        """Of the stacks that have adapters."""
        return [stack.table for stack in (self.gate_up, self.down) if stack.table is not None]

    def add_to(self, x: Tensor, normed: Tensor, slots: Tensor | None, project: Project) -> Tensor:
        """x [T, H] + what the experts give for its norm; `slots` [T] as `ExpertStack.forward` takes them."""
        routing = self.scoring.route(
            project(self.router, normed.to(self.router.dtype)).contiguous(), self.router_bias
        )
        wide = self.gate_up.forward(spread_rows(normed, routing.tokens), routing, slots)
        act = grouped_glu_forward(wide, routing.row_weights, self.gating)
        out = gather_rows(self.down.forward(act, routing, slots, routing.row_weights), routing.places, x)
        return out if self.shared is None else out.add_(self.shared.forward(normed, self.activation, project))
