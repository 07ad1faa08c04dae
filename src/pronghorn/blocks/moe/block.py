"""A layer's mixture of experts: residual sum, norm, router, experts, sum over a token's experts, shared expert.

    n = norm(y);  l = n Wrᵀ;  (e_j, w_j) = route(l);  out = y + Σ_j E_{e_j}(n, w_j) + shared(n)
    E_e(n, w) = down_e(w · act(gate_up_e(n)))

The T · k pairs of a token and an expert lie sorted by expert; all shapes are static and nothing waits for a count. The
gradient of a routing weight is that of a factor of the activation, so the experts' outputs are never made again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pronghorn.blocks.glu import tile_slices
from pronghorn.blocks.levels import Level, keeps
from pronghorn.blocks.moe.balance import RouterBalance
from pronghorn.blocks.moe.experts import ExpertProjection
from pronghorn.blocks.moe.shared import SharedExpert
from pronghorn.blocks.norm import Norm
from pronghorn.blocks.projection import GradientSink, ProjectionGroup
from pronghorn.kernels.dispatch import math_dtype
from pronghorn.kernels.grouped_glu import Gating, grouped_glu_backward_, grouped_glu_forward
from pronghorn.kernels.grouped_rows import gather_rows, spread_rows
from pronghorn.kernels.routing import Routing, Scoring
from pronghorn.weights import Operand
from pronghorn.weights.operand import Turned

#: Tokens whose rows exist at a time: T · k rows of the widest tensors otherwise.
TILE_TOKENS = 16384


@dataclass
class MoeSaves:
    """Tensors between forward and backward; None means dropped by the save level and rebuilt when needed."""

    summed: Tensor | None = None
    #: [T, E], from which the routing is made again
    logits: Tensor | None = None
    #: [T · k, 2I] in the order of the experts, and the adapters' products
    gate_up: Tensor | None = None
    xa_gate_up: Tensor | None = None
    xa_down: Tensor | None = None
    normed: Tensor | None = None

    def trim(self, level: Level) -> None:
        """Drop what the level does not keep."""
        if not keeps(level, "attention"):
            self.summed = self.logits = None
        if not keeps(level, "matmuls"):
            self.gate_up = self.xa_gate_up = self.xa_down = None
        if not keeps(level, "all"):
            self.normed = None

    def rows(self, at: slice) -> MoeSaves:
        """Views of some tokens, where nothing is kept in the order of the experts."""
        assert self.gate_up is None
        names = ("summed", "logits", "normed")
        return MoeSaves(**{n: t[at] for n in names if (t := getattr(self, n)) is not None})


@dataclass(frozen=True)
class MoeBlock:
    """The second half of a layer whose MLP is a mixture of experts.

    `router_bias` [E] is added to the scores for the choice of experts alone. `tile_tokens`: most tokens whose rows
    exist at a time where no level keeps them. `balance`: takes down what the router does, for the auxiliary loss.
    """

    norm: Norm
    router: ProjectionGroup
    scoring: Scoring
    gate_up: ExpertProjection
    down: ExpertProjection
    gating: Gating
    shared: SharedExpert | None = None
    router_bias: Tensor | None = None
    tile_tokens: int = TILE_TOKENS
    balance: RouterBalance | None = None

    Saves: ClassVar[type[MoeSaves]] = MoeSaves

    def trainable(self) -> list[Tensor]:
        shared = [] if self.shared is None else self.shared.trainable()
        parts = (self.norm, self.router, self.gate_up, self.down)
        return [t for part in parts for t in part.trainable()] + shared

    def tiles(self, tokens: int) -> list[slice]:
        """The tokens in tiles of about equal height; one where gradients in 16 bits would be rounded at every tile."""
        wide = all(t.dtype in (torch.float32, torch.float64) for t in self.trainable())
        return tile_slices(tokens, self.tile_tokens) if wide else [slice(0, tokens)]

    def add_residual(self, x: Tensor, branch: Tensor | None, dtype: torch.dtype, saves: MoeSaves) -> None:
        """The residual sum y [T, H] in x's dtype, and its norm; without a branch y is x."""
        normed, saves.summed = self.norm.forward(
            x if branch is None else branch.to(x.dtype), dtype, residual=None if branch is None else x
        )
        saves.normed = normed.tensor

    def forward(self, dtype: torch.dtype, level: Level, saves: MoeSaves) -> Tensor:
        """The layer's output [T, H] in the residual's dtype from `add_residual`'s saves, which are filled and
        trimmed to what the level keeps."""
        assert saves.summed is not None
        tokens = saves.summed.shape[0]
        tiles = [slice(0, tokens)] if keeps(level, "matmuls") else self.tiles(tokens)
        if len(tiles) == 1:
            out = self._forward_rows(dtype, level, saves, tiles[0])
        else:
            out = torch.empty_like(saves.summed)
            logits = []
            for at in tiles:
                part = saves.rows(at)
                out[at] = self._forward_rows(dtype, level, part, at)
                logits.append(part.logits)
            if keeps(level, "attention"):
                saves.logits = torch.cat([t for t in logits if t is not None])
        saves.trim(level)
        return out

    def _forward_rows(self, dtype: torch.dtype, level: Level, saves: MoeSaves, at: slice) -> Tensor:
        routing = self._rebuild(dtype, saves)
        if self.balance is not None and saves.logits is not None:
            self.balance.saw(saves.logits, routing.indices, at)
        assert saves.summed is not None and saves.gate_up is not None and saves.normed is not None
        shared = None if self.shared is None else self.shared.forward(saves.normed)
        if not keeps(level, "all"):
            saves.normed = None
        act = grouped_glu_forward(saves.gate_up, routing.row_weights, self.gating)
        if not keeps(level, "matmuls"):
            saves.gate_up = None
        y, saves.xa_down = self.down.forward(act, routing.groups, routing.row_weights)
        del act
        out = gather_rows(y, routing.places, saves.summed)
        return out if shared is None else out.add_(shared)

    def _rebuild(self, dtype: torch.dtype, saves: MoeSaves) -> Routing:
        """The routing; computes whatever is missing in `saves` up to gate and up, from the residual sum."""
        normed = self._normed(dtype, saves)
        if saves.logits is None:
            (saves.logits,), _ = self.router.forward(self._for_router(normed))
        routing = self.scoring.route(saves.logits, self.router_bias)
        if saves.gate_up is None:
            rows = spread_rows(normed, routing.tokens)
            saves.gate_up, saves.xa_gate_up = self.gate_up.forward(rows, routing.groups)
        return routing

    def _normed(self, dtype: torch.dtype, saves: MoeSaves) -> Tensor:
        if saves.normed is None:
            assert saves.summed is not None
            saves.normed = self.norm.forward(saves.summed, dtype)[0].tensor
        return saves.normed

    def _for_router(self, normed: Tensor) -> Tensor:
        """What the router multiplies."""
        return normed.to(math_dtype(normed.dtype)) if self.scoring.wide_logits else normed

    def backward(
        self,
        dout: Tensor,
        dtype: torch.dtype,
        saves: MoeSaves,
        sink: GradientSink,
        columns: Tensor | Turned | None = None,
    ) -> Operand:
        """Gradient of the residual sum y [T, H]; `saves` hold at least that sum and are consumed here. `columns` as
        `GluBlock.backward` takes them."""
        assert saves.summed is not None
        tokens = dout.shape[0]
        tiles = self.tiles(tokens) if saves.gate_up is None else [slice(0, tokens)]
        if len(tiles) == 1:
            same = saves.summed.dtype == dtype
            return self._backward_rows(dout, dtype, saves, sink, tiles[0], columns if same else None)
        dsummed = torch.empty_like(saves.summed)
        for at in tiles:
            dsummed[at] = self._backward_rows(dout[at], dtype, saves.rows(at), sink, at).tensor
        return Operand(dsummed)

    def _backward_rows(
        self,
        dout: Tensor,
        dtype: torch.dtype,
        saves: MoeSaves,
        sink: GradientSink,
        at: slice,
        columns: Tensor | Turned | None = None,
    ) -> Operand:
        routing = self._rebuild(dtype, saves)
        dbranch = dout if dout.dtype == dtype else dout.to(dtype)
        summed, normed, logits = saves.summed, saves.normed, saves.logits
        assert summed is not None and normed is not None and logits is not None
        dgate_up, dweights = self._through_activation(dbranch, routing, saves, sink)
        drows, dxa = self.gate_up.input_grad(dgate_up, routing.groups)
        rows = spread_rows(normed, routing.tokens)
        self.gate_up.parameter_grads(dgate_up, rows, saves.xa_gate_up, dxa, routing.groups, sink)
        del rows, dgate_up
        dnormed = gather_rows(drows, routing.places)
        del drows
        dlogits = self.scoring.backward(dweights, logits, routing)
        dbalance = None if self.balance is None else self.balance.logits_grad(logits, at)
        read = self._for_router(normed)
        dlogits = (dlogits if dbalance is None else dlogits + dbalance).to(read.dtype)
        drouter, dxa = self.router.input_grad([dlogits], read, sink)
        assert drouter is not None
        self.router.parameter_grads([dlogits], read, None, dxa, sink)
        del read
        dnormed += drouter
        if self.shared is not None:
            dnormed += self.shared.backward(dbranch, normed, sink)
        return self.norm.backward(dnormed, summed, dout, sink, columns)

    def _through_activation(
        self, dbranch: Tensor, routing: Routing, saves: MoeSaves, sink: GradientSink
    ) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up in their own storage and of the rows' weights [S]; the down projection's parameter
        gradients."""
        gate_up, groups, down = saves.gate_up, routing.groups, self.down
        assert gate_up is not None
        saves.gate_up = None
        dy = spread_rows(dbranch, routing.tokens)
        dact, dxa = down.input_grad(dy, groups)
        act, dgate_up, dweights = grouped_glu_backward_(dact, gate_up, routing.row_weights, self.gating)
        if down.bias is not None:
            dweights += (dy * down.bias.detach()[groups.experts]).sum(1, dtype=dweights.dtype)
        down.parameter_grads(dy, act, saves.xa_down, dxa, groups, sink, routing.row_weights)
        return dgate_up, dweights
