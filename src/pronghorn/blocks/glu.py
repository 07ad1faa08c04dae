"""The GLU block: residual sum, norm, gate/up, activation, down, residual. Explicit forward and backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pronghorn.blocks.levels import Level, keeps
from pronghorn.blocks.norm import Norm
from pronghorn.blocks.projection import GradientSink, ProjectionGroup
from pronghorn.kernels.glu import glu_backward, glu_forward
from pronghorn.kernels.rms_norm import rms_norm_backward, rms_norm_forward


@dataclass
class GluSaves:
    """Tensors between forward and backward; None means dropped by the save level and rebuilt when needed."""

    summed: Tensor | None = None
    gate: Tensor | None = None
    up: Tensor | None = None
    xa_gate_up: Tensor | None = None
    xa_down: Tensor | None = None
    normed: Tensor | None = None

    def trim(self, level: Level) -> None:
        """Drop what the level does not keep."""
        if not keeps(level, "attention"):
            self.summed = None
        if not keeps(level, "matmuls"):
            self.gate = self.up = self.xa_gate_up = self.xa_down = None
        if not keeps(level, "all"):
            self.normed = None


@dataclass(frozen=True)
class GluBlock:
    """out = y + down(act(gate(n)) · up(n)) with y = x + branch and n = norm(y); activation by name."""

    norm: Norm
    gate_up: ProjectionGroup
    down: ProjectionGroup
    activation: str

    def trainable(self) -> list[Tensor]:
        return self.norm.trainable() + self.gate_up.trainable() + self.down.trainable()

    def forward(self, x: Tensor, branch: Tensor, dtype: torch.dtype, level: Level) -> tuple[Tensor, GluSaves]:
        """The layer's output [T, H] in x's dtype, and what the level keeps."""
        saves = GluSaves()
        self.rebuild(x, branch, dtype, saves)
        assert saves.summed is not None and saves.gate is not None and saves.up is not None
        act = glu_forward(saves.gate, saves.up, self.activation)
        if not keeps(level, "matmuls"):
            saves.gate = saves.up = None
        # The residual sum becomes the output in place where nothing keeps it: one pass over [T, H] less.
        out = saves.summed.clone() if keeps(level, "attention") else saves.summed
        saves.xa_down = self.down.forward_add_(out, act)
        saves.trim(level)
        return out, saves

    def rebuild(self, x: Tensor, branch: Tensor | None, dtype: torch.dtype, saves: GluSaves) -> None:
        """Compute whatever is missing in `saves` up to gate and up; `branch` may be None when `summed` is kept."""
        if saves.gate is not None:
            return
        norm = self.norm
        if saves.summed is None:
            assert branch is not None
            saves.normed, _, saves.summed = rms_norm_forward(
                branch.to(x.dtype),
                norm.weight,
                norm.eps,
                residual=x,
                weight_offset=norm.offset,
                out_dtype=dtype,
            )
        else:
            saves.normed = self._normed(saves.summed, dtype)
        (saves.gate, saves.up), saves.xa_gate_up = self.gate_up.forward(saves.normed)

    def _normed(self, summed: Tensor, dtype: torch.dtype) -> Tensor:
        norm = self.norm
        return rms_norm_forward(summed, norm.weight, norm.eps, weight_offset=norm.offset, out_dtype=dtype)[0]

    def backward(self, dout: Tensor, dtype: torch.dtype, saves: GluSaves, sink: GradientSink) -> Tensor:
        """Gradient of the residual sum y [T, H]; `saves` rebuilt before, consumed here."""
        dbranch = dout if dout.dtype == dtype else dout.to(dtype)
        gate, up, summed = saves.gate, saves.up, saves.summed
        assert gate is not None and up is not None and summed is not None
        saves.gate = saves.up = None
        dact, dxa_down = self.down.input_grad([dbranch], lambda: glu_forward(gate, up, self.activation), sink)
        assert dact is not None
        # In place: the kept gate and up become their gradients, dact becomes the rebuilt activation.
        act, dgate, dup = glu_backward(dact, gate, up, self.activation, inplace=True)
        self.down.parameter_grads([dbranch], act, saves.xa_down, dxa_down, sink)
        del act, dact
        norm = self.norm
        normed = self._normed(summed, dtype) if saves.normed is None else saves.normed
        dnormed, dxa = self.gate_up.input_grad([dgate, dup], normed, sink)
        self.gate_up.parameter_grads([dgate, dup], normed, saves.xa_gate_up, dxa, sink)
        assert dnormed is not None
        dsummed, dweight = rms_norm_backward(
            dnormed,
            summed,
            norm.weight,
            None,
            eps=norm.eps,
            weight_offset=norm.offset,
            residual_grad=dout,
            need_weight_grad=sink.wants(norm.weight),
        )
        if dweight is not None:
            sink.add(norm.weight, dweight)
        return dsummed
