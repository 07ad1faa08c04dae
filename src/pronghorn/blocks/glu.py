"""The GLU block: residual sum, norm, gate/up, activation, down, optional norm or factor, residual. Explicit forward and
backward.

Gate, up and their gradients are the widest tensors of a layer (8B: 57 KB a token against 8 KB of a layer's input).
Rows are independent, so for many tokens the block runs over tiles of rows, forward and backward, and the wide tensors
exist for one tile at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pronghorn.blocks import gated_products, joining
from pronghorn.blocks.levels import ROOMY_TILES, Level, keeps
from pronghorn.blocks.norm import NoNorm, Norm
from pronghorn.blocks.projection import GradientSink, ProjectionGroup, rows_are_independent
from pronghorn.kernels import glu_products
from pronghorn.kernels.glu import glu_backward, glu_backward_down_, glu_forward, glu_forward_down
from pronghorn.kernels.lora import LowRank
from pronghorn.weights import Fp8Weight, Operand
from pronghorn.weights.operand import Turned

#: Rows of a tile unless told otherwise: enough for products at full speed, and for a 4-bit weight that is dequantised
#: for every tile.
TILE_ROWS = 16384
#: Tiles are cut at multiples of this, the matrix units' own tile.
TILE_STEP = 128


def tile_slices(tokens: int, tile_rows: int) -> list[slice]:
    """[tokens] in tiles of about equal height, at most `tile_rows`; `ROOMY_TILES` are of the usual height where a batch
    is longer than any that was planned for."""
    rows = TILE_ROWS if tile_rows >= ROOMY_TILES else tile_rows
    count = -(-tokens // max(rows, TILE_STEP))
    if count <= 1:
        return [slice(0, tokens)]
    height = -(-tokens // (count * TILE_STEP)) * TILE_STEP
    return [slice(start, min(start + height, tokens)) for start in range(0, tokens, height)]


@dataclass
class GluSaves:
    """Tensors between forward and backward; None means dropped by the save level and rebuilt when needed."""

    summed: Tensor | None = None
    gate: Tensor | None = None
    up: Tensor | None = None
    #: XA of gate and up that lack their adapters' share, or
    xa_gate_up: Tensor | None = None
    #: of those that have it
    xa_added: Tensor | None = None
    xa_down: Tensor | None = None
    #: what the down projection gave, where a norm of it follows
    projected: Tensor | None = None
    normed: Tensor | None = None
    #: `normed` in 8 bits, from the kernel that made it until gate and up are there
    codes: Tensor | None = None
    code_scales: Tensor | None = None

    @property
    def xa_of_gate_up(self) -> Tensor | None:
        return self.xa_added if self.xa_gate_up is None else self.xa_gate_up

    def take_normed(self, normed: Operand) -> None:
        self.normed = normed.tensor
        self.codes, self.code_scales = normed.made or (None, None)

    def normed_operand(self) -> Operand | None:
        """What gate and up are made of, where it is there."""
        if self.normed is None:
            return None
        return Operand.with_codes(self.normed, self.codes, self.code_scales)

    def trim(self, level: Level) -> None:
        """Drop what the level does not keep."""
        self.codes = self.code_scales = None
        # With the attention's own output kept for its norm, the residual sum is rebuilt from it.
        if not keeps(level, "attention") or (self.projected is not None and not keeps(level, "all")):
            self.summed = None
        if not keeps(level, "attention"):
            self.projected = None
        if not keeps(level, "matmuls"):
            self.gate = self.up = self.xa_gate_up = self.xa_added = self.xa_down = None
        if not keeps(level, "all"):
            self.normed = None

    def rows(self, at: slice) -> GluSaves:
        """Views of some rows."""
        return GluSaves(**{name: None if t is None else t[at] for name, t in vars(self).items()})


@dataclass(frozen=True)
class GluBlock:
    """out = y + down(act(gate(n)) · up(n)) with y = x + branch and n = norm(y); activation by name.

    `tile_rows`: most rows that gate and up exist for at a time where no level keeps them. `output_norm` and
    `output_scale` come between the down projection and the residual sum; the attention block has a norm there where
    this one has. `beside_attention`: y is the layer's input, which others keep; the attention's branch is added to out.
    """

    Saves: ClassVar[type[GluSaves]] = GluSaves

    norm: Norm | NoNorm
    gate_up: ProjectionGroup
    down: ProjectionGroup
    activation: str
    tile_rows: int = TILE_ROWS
    output_norm: Norm | None = None
    output_scale: float = 1.0
    beside_attention: bool = False

    def trainable(self) -> list[Tensor]:
        norms = self.norm.trainable() + ([] if self.output_norm is None else self.output_norm.trainable())
        return norms + self.gate_up.trainable() + self.down.trainable()

    @property
    def adds_down(self) -> bool:
        """Whether the down projection's product is added to the residual sum as it is."""
        return self.output_norm is None and self.output_scale == 1.0

    def tiles(self, tokens: int) -> list[slice]:
        """The rows of [tokens] in tiles of about equal height; one where tiles would change what is computed."""
        tiles = tile_slices(tokens, self.tile_rows)
        return tiles if len(tiles) == 1 or self.rows_are_independent() else [slice(0, tokens)]

    def rows_are_independent(self) -> bool:
        """Whether tiles give what all rows at once give."""
        return rows_are_independent((*self.gate_up.projections, *self.down.projections), self.trainable())

    def add_residual(self, x: Tensor, branch: Tensor | None, dtype: torch.dtype, saves: GluSaves) -> None:
        """The residual sum y [T, H] in x's dtype, and its norm; without a branch y is x."""
        # Codes of all rows are not held through many tiles, which make their own.
        whole = len(self.tiles(x.shape[0])) == 1
        normed, saves.summed = self.norm.forward(
            x if branch is None else branch.to(x.dtype),
            dtype,
            residual=None if branch is None else x,
            fp8=whole and self.gate_up.quantises_rows,
            int8=whole and self.gate_up.turns_rows,
        )
        saves.take_normed(normed)

    def forward(self, dtype: torch.dtype, level: Level, saves: GluSaves) -> Tensor:
        """The layer's output [T, H] in the residual's dtype from `add_residual`'s saves, which are filled and
        trimmed to what the level keeps."""
        assert saves.summed is not None
        summed, tokens = saves.summed, saves.summed.shape[0]
        tiles = [slice(0, tokens)] if keeps(level, "matmuls") else self.tiles(tokens)
        if not self.adds_down:
            out = self._forward_apart(dtype, level, saves, tiles)
        elif len(tiles) > 1:
            # The residual sum becomes the output in place where nothing keeps it.
            out = summed.clone() if self._keeps_sum(level) else summed
            for at in tiles:
                self.down.forward_add_(out[at], *self._activated(dtype, level, saves.rows(at)))
        elif self._keeps_sum(level):
            out, saves.xa_down = self.down.forward_residual(summed, *self._activated(dtype, level, saves))
        else:
            out = summed
            saves.xa_down = self.down.forward_add_(out, *self._activated(dtype, level, saves))
        saves.trim(level)
        if isinstance(self.norm, NoNorm):  # the sum itself
            saves.normed = None
        return out

    def _forward_apart(self, dtype: torch.dtype, level: Level, saves: GluSaves, tiles: list[slice]) -> Tensor:
        """The layer's output where something comes between the down projection and the residual sum."""
        summed = saves.summed
        assert summed is not None
        # The residual sum becomes the output in place where nothing keeps it.
        out = torch.empty_like(summed) if self._keeps_sum(level) else summed
        keeps_projected = self.output_norm is not None and keeps(level, "attention")
        projected = (
            summed.new_empty(summed.shape, dtype=dtype) if keeps_projected and len(tiles) > 1 else None
        )
        for at in tiles:
            rows = saves.rows(at) if len(tiles) > 1 else saves
            act, xa = self._activated(dtype, level, rows)
            (branch,), xa = self.down.forward(act, xa=xa)
            del act
            if projected is not None:
                projected[at] = branch
            elif keeps_projected:
                projected = branch
            if len(tiles) == 1:
                saves.xa_down = xa
            if self.output_norm is not None:
                branch = self.output_norm.forward(branch, dtype)[0].tensor
            torch.add(summed[at], branch, alpha=self.output_scale, out=out[at])
        saves.projected = projected
        return out

    def _keeps_sum(self, level: Level) -> bool:
        """Whether the residual sum itself is kept (`GluSaves.trim`), here or by who gave it."""
        return self.beside_attention or keeps(level, "attention" if self.output_norm is None else "all")

    def _activated(self, dtype: torch.dtype, level: Level, saves: GluSaves) -> tuple[Operand, Tensor | None]:
        """act [rows, I], and the down projection's XA where it was formed along the way; what the level does not keep
        is let go of as early as possible."""
        if self._in_product(dtype, saves):
            return self._activated_in_product(dtype, level, saves)
        self._rebuild(dtype, saves)
        saves.codes = saves.code_scales = None
        if not keeps(level, "all"):
            saves.normed = None
        activated = self._act_and_xa(saves)
        if not keeps(level, "matmuls"):
            saves.gate = saves.up = None
        return activated

    def _in_product(self, dtype: torch.dtype, saves: GluSaves) -> bool:
        """Whether one product makes gate and up of these rows complete."""
        assert saves.summed is not None
        return gated_products.takes_gate_up(self.gate_up, saves.summed, dtype)

    def _activated_in_product(
        self, dtype: torch.dtype, level: Level, saves: GluSaves
    ) -> tuple[Operand, Tensor | None]:
        """`_activated` where one product makes everything; what no level keeps is never written."""
        call = self._product(dtype, saves, keeps(level, "matmuls"))
        if not keeps(level, "all"):
            saves.normed = None
        saves.gate, saves.up, act, xa_down = glu_products.gate_up_act(call)
        return Operand(act), xa_down

    def _product(self, dtype: torch.dtype, saves: GluSaves, keep: bool) -> glu_products.GateUp:
        """What one product makes gate and up of; their XA is kept."""
        normed = self._normed(dtype, saves)
        saves.xa_added = self.gate_up.down(normed)
        a = gated_products.a_of_down(self.down, normed)
        return gated_products.call_of(self.gate_up, normed, saves.xa_added, self.activation, a, keep)

    def _act_and_xa(self, saves: GluSaves) -> tuple[Operand, Tensor | None]:
        """act [rows, I] of gate and up, and the down projection's XA where one kernel makes both."""
        assert saves.gate is not None and saves.up is not None
        a, xa_down = self.down.a_for_producer(saves.gate), None
        row_max = None
        if joining.ROW_MAX_FORWARD and self.down.quantises_rows:
            row_max = saves.gate.new_zeros(saves.gate.shape[0], dtype=torch.float32)
        if a is None:
            act = self._act(saves.gate, saves.up, saves.xa_gate_up, row_max)
        else:
            gate_adapter, up_adapter = self._lacking(saves.xa_gate_up)
            act, xa_down = glu_forward_down(
                saves.gate,
                saves.up,
                self.activation,
                a,
                gate_adapter=gate_adapter,
                up_adapter=up_adapter,
                row_max=row_max,
            )
        return Operand(act, row_max=row_max), xa_down

    def _rebuild(self, dtype: torch.dtype, saves: GluSaves, whole: bool = True) -> None:
        """Compute whatever is missing in `saves` up to gate and up, from the residual sum; by the kernels that made it
        first, which for int8 depend on whether there are tiles."""
        if saves.gate is None and self._in_product(dtype, saves):
            # With the down projection's XA, which nobody keeps without them.
            saves.gate, saves.up, saves.xa_down = glu_products.gate_up(self._product(dtype, saves, True))
        elif saves.gate is None:
            int8 = whole and self.gate_up.turns_rows
            self._normed(dtype, saves, fp8=self.gate_up.quantises_rows, int8=int8)
            normed = saves.normed_operand()
            assert normed is not None
            (saves.gate, saves.up), saves.xa_gate_up = self.gate_up.forward(
                normed, defer_adapters=True, joined=joining.GATE_UP_FORWARD
            )

    def _act(self, gate: Tensor, up: Tensor, xa: Tensor | None, row_max: Tensor | None = None) -> Tensor:
        """act [rows, I]; gate and up may lack their adapters' share, which the activation takes in on the way."""
        gate_adapter, up_adapter = self._lacking(xa)
        return glu_forward(
            gate, up, self.activation, gate_adapter=gate_adapter, up_adapter=up_adapter, row_max=row_max
        )

    def _lacking(self, xa: Tensor | None) -> tuple[LowRank | None, LowRank | None]:
        """The adapters' shares that gate and up were left without."""
        return self.gate_up.deferred(0, xa), self.gate_up.deferred(1, xa)

    def _normed(self, dtype: torch.dtype, saves: GluSaves, fp8: bool = False, int8: bool = False) -> Tensor:
        if saves.normed is None:
            assert saves.summed is not None
            saves.take_normed(self.norm.forward(saves.summed, dtype, fp8=fp8, int8=int8)[0])
        assert saves.normed is not None
        return saves.normed

    def backward(
        self,
        dout: Tensor,
        dtype: torch.dtype,
        saves: GluSaves,
        sink: GradientSink,
        columns: Tensor | Turned | None = None,
    ) -> Operand:
        """Gradient of the residual sum y [T, H]; `saves` hold at least that sum and are consumed here. With `columns`
        (`ProjectionGroup.columns_of_dy` of the projection that it goes to next) it is quantised where it is made."""
        assert saves.summed is not None
        tiles = self.tiles(dout.shape[0])
        if len(tiles) == 1:
            same = saves.summed.dtype == dtype
            return self._backward_rows(dout, dtype, saves, sink, columns if same else None, whole=True)
        dsummed = torch.empty_like(saves.summed)
        for at in tiles:
            dsummed[at] = self._backward_rows(dout[at], dtype, saves.rows(at), sink).tensor
        return Operand(dsummed)

    def _backward_rows(
        self,
        dout: Tensor,
        dtype: torch.dtype,
        saves: GluSaves,
        sink: GradientSink,
        columns: Tensor | Turned | None = None,
        whole: bool = False,
    ) -> Operand:
        self._rebuild(dtype, saves, whole)
        saves.codes = saves.code_scales = None
        dbranch = self._branch_grad(dout, dtype, saves, sink)
        gate, up, summed = saves.gate, saves.up, saves.summed
        assert gate is not None and up is not None and summed is not None
        saves.gate = saves.up = None
        exponents, row_max = self.gate_up.fp8_columns() if joining.ROW_MAX_BACKWARD else None, None
        if exponents is not None:
            row_max = gate.new_zeros(gate.shape[0], dtype=torch.float32)
        dgate, dup = self._through_activation(gate, up, dbranch, saves, sink, row_max, exponents)
        normed = self._normed(dtype, saves)
        stack, of_stack = self.gate_up.stack, None
        if row_max is not None and isinstance(stack, Fp8Weight):
            of_stack = Operand.joined([dgate, dup], stack.columns, row_max)
        dys = self.gate_up.of_outputs([dgate, dup])
        del dgate, dup
        dnormed, dxa = self.gate_up.input_grad(
            dys,
            normed,
            sink,
            xa=saves.xa_of_gate_up,
            joined=joining.GATE_UP_INPUT_GRAD,
            of_stack=of_stack,
        )
        del of_stack
        self.gate_up.parameter_grads(dys, normed, saves.xa_of_gate_up, dxa, sink)
        assert dnormed is not None
        return self.norm.backward(dnormed, summed, dout, sink, columns)

    def _branch_grad(self, dout: Tensor, dtype: torch.dtype, saves: GluSaves, sink: GradientSink) -> Tensor:
        """The gradient of the down projection's output, from the one of the layer's output."""
        if self.output_scale != 1.0:
            dout = dout * self.output_scale
        if self.output_norm is None:
            return dout if dout.dtype == dtype else dout.to(dtype)
        projected, saves.projected = saves.projected, None
        if projected is None:
            act, xa = self._act_and_xa(saves)
            (projected,), saves.xa_down = self.down.forward(act, xa=xa)
            del act
        return self.output_norm.backward(dout, projected, None, sink).tensor

    def _through_activation(
        self,
        gate: Tensor,
        up: Tensor,
        dbranch: Tensor,
        saves: GluSaves,
        sink: GradientSink,
        row_max: Tensor | None,
        exponents: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up in their own storage, and the down projection's parameter gradients; the largest of
        their rows into `row_max`, with the `exponents` of their columns."""
        maxima: Any = {"row_max": row_max, "exponents": exponents}
        down, xa_down = self.down, saves.xa_down
        gate_adapter, up_adapter = self._lacking(saves.xa_gate_up)
        packed = down.left_to_producer(dbranch, xa_down, sink)
        whole = gate_adapter is None and up_adapter is None
        if packed is not None and whole and gated_products.takes_down(down, packed, dbranch):
            of_dxa = down.adapter_output_grads(dbranch, xa_down, sink)
            gated_products.through_activation_(down, packed, dbranch, gate, up, self.activation, of_dxa)
            return gate, up
        dact, grads = down.input_grad(
            [dbranch],
            lambda: self._act(gate, up, saves.xa_gate_up),
            sink,
            xa=xa_down,
            defer_adapters=packed is not None,
        )
        assert dact is not None
        if packed is not None and packed.a_grad is not None and grads is not None:
            glu_backward_down_(
                dact,
                gate,
                up,
                self.activation,
                grads.dxa,
                packed.a,
                packed.a_grad,
                gate_adapter=gate_adapter,
                up_adapter=up_adapter,
                **maxima,
            )
            return gate, up
        # dact becomes the rebuilt activation.
        act, dgate, dup = glu_backward(
            dact,
            gate,
            up,
            self.activation,
            gate_adapter=gate_adapter,
            up_adapter=up_adapter,
            inplace=True,
            **maxima,
        )
        down.parameter_grads([dbranch], act, xa_down, grads, sink)
        return dgate, dup
