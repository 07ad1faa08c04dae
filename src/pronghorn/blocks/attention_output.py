"""What every kind of attention ends in: the o-projection, and an optional norm or factor of what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pronghorn.blocks.levels import Level
from pronghorn.blocks.norm import Norm
from pronghorn.blocks.projection import GradientSink, ProjectionGroup
from pronghorn.weights import Operand
from pronghorn.weights.operand import Turned


class OutputSaves(Protocol):
    """Of a block's saves: the attention's output [T, N, F], o's XA, and what o gave where a norm of it follows."""

    out: Tensor | None
    xa_o: Tensor | None
    projected: Tensor | None
    normed: Tensor | None

    def trim(self, level: Level) -> None: ...


@dataclass(frozen=True, kw_only=True)
class AttentionOutput:
    """output_scale · output_norm(o(out)) of the attention's output [T, N, F], N heads of F."""

    o: ProjectionGroup
    output_norm: Norm | None = None
    output_scale: float = 1.0

    def read_by_o(self, saves: Any) -> Tensor:
        """What the o-projection reads [T, N·F]: the attention's output, or what a gate leaves of it."""
        out: Tensor = saves.out
        return out.view(out.shape[0], -1)

    def output(self, saves: OutputSaves, read: Tensor | None = None) -> Tensor:
        """The block's output before the residual [T, H]: the o-projection of what it reads, which may be at hand."""
        branch = saves.projected
        if branch is None:
            read = self.read_by_o(saves) if read is None else read
            (branch,), saves.xa_o = self.o.forward(read, xa=saves.xa_o)
        if self.output_norm is not None:
            saves.projected = branch
            branch = self.output_norm.forward(branch, branch.dtype)[0].tensor
        return branch if self.output_scale == 1.0 else branch.mul_(self.output_scale)

    def onto(self, x: Tensor, saves: OutputSaves) -> tuple[Tensor, Tensor | None]:
        """The residual sum x + output and None, where one product makes it; else x and the output [T, H]."""
        if self.output_norm is not None or self.output_scale != 1.0:
            return x, self.output(saves)
        read = self.read_by_o(saves)
        summed, saves.xa_o = self.o.onto(x, read, saves.xa_o)
        return (x, self.output(saves, read)) if summed is None else (summed, None)

    def add_output_(self, out: Tensor, saves: OutputSaves) -> None:
        """out [T, H] += o of the kept attention output, with neither norm nor factor after it."""
        assert saves.out is not None and self.output_norm is None and self.output_scale == 1.0
        saves.xa_o = self.o.forward_add_(out, self.read_by_o(saves))

    def columns_of_dy(self) -> Tensor | Turned | None:
        """`ProjectionGroup.columns_of_dy` of o, where the gradient of the residual sum is the one of its output."""
        return self.o.columns_of_dy() if self.output_norm is None and self.output_scale == 1.0 else None

    def output_grad(self, dy: Operand, dtype: torch.dtype, saves: OutputSaves, sink: GradientSink) -> Tensor:
        """The gradient of what the o-projection reads [T, N, F] from that of the residual sum [T, H]."""
        dbranch = self._branch_grad(dy, dtype, saves, sink)
        del dy
        out = saves.out
        assert out is not None
        flat = self.read_by_o(saves)
        dout, dxa = self.o.input_grad([dbranch], flat, sink, xa=saves.xa_o)
        self.o.parameter_grads([dbranch], flat, saves.xa_o, dxa, sink)
        dbranch.release()
        assert dout is not None
        return dout.view_as(out)

    def _branch_grad(
        self, dy: Operand, dtype: torch.dtype, saves: OutputSaves, sink: GradientSink
    ) -> Operand:
        """The gradient of the o-projection's output, from that of the residual sum."""
        if self.output_scale != 1.0:
            dy = Operand(dy.tensor * self.output_scale)
        if self.output_norm is None:
            return dy if dy.tensor.dtype == dtype else Operand(dy.tensor.to(dtype))
        projected, saves.projected = saves.projected, None
        assert projected is not None
        return self.output_norm.backward(dy.tensor, projected, None, sink, self.o.columns_of_dy())
