"""The expert that every token goes through, beside the routed ones; in some families behind a gate of its own.

    shared(n) = σ(n wᵀ) · down(act(gate(n)) · up(n)),   w [1, H]; without a gate its factor is one

It keeps nothing: gate, up and the gate's logit are made again from n in backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pronghorn.blocks.projection import GradientSink, ProjectionGroup
from pronghorn.kernels.dispatch import math_dtype
from pronghorn.kernels.glu import glu_backward, glu_forward


@dataclass(frozen=True)
class SharedExpert:
    """A gated linear unit and, where the family has one, the gate of its output."""

    gate_up: ProjectionGroup
    down: ProjectionGroup
    activation: str
    gate: ProjectionGroup | None = None

    def trainable(self) -> list[Tensor]:
        groups = (self.gate_up, self.down, self.gate)
        return [t for group in groups if group is not None for t in group.trainable()]

    def forward(self, normed: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        (gate, up), _ = self.gate_up.forward(normed)
        (out,), _ = self.down.forward(glu_forward(gate, up, self.activation))
        openness = self._openness(normed)
        return out if openness is None else out.mul_(openness)

    def backward(self, dout: Tensor, normed: Tensor, sink: GradientSink) -> Tensor:
        """Gradient of `normed` [T, H] from that of the output; parameters' gradients go to the sink."""
        (gate, up), xa = self.gate_up.forward(normed)
        openness = self._openness(normed)
        dgate_logit: Tensor | None = None
        dbranch = dout
        if openness is not None:
            (out,), _ = self.down.forward(glu_forward(gate, up, self.activation))
            wide = math_dtype(out.dtype)
            inner = (dout.to(wide) * out).sum(1, keepdim=True)
            factor = openness.to(wide)
            dgate_logit = (inner * factor * (1 - factor)).to(dout.dtype)
            dbranch = dout * openness
        dact, dxa = self.down.input_grad([dbranch], lambda: glu_forward(gate, up, self.activation), sink)
        assert dact is not None
        act, dgate, dup = glu_backward(dact, gate, up, self.activation)
        self.down.parameter_grads([dbranch], act, None, dxa, sink)
        dnormed, dxa = self.gate_up.input_grad([dgate, dup], normed, sink, xa=xa)
        self.gate_up.parameter_grads([dgate, dup], normed, xa, dxa, sink)
        assert dnormed is not None
        if self.gate is None or dgate_logit is None:
            return dnormed
        dgate_input, dxa = self.gate.input_grad([dgate_logit], normed, sink)
        self.gate.parameter_grads([dgate_logit], normed, None, dxa, sink)
        assert dgate_input is not None
        return dnormed + dgate_input

    def _openness(self, normed: Tensor) -> Tensor | None:
        """σ(n wᵀ) [T, 1]."""
        if self.gate is None:
            return None
        (logit,), _ = self.gate.forward(normed)
        return torch.sigmoid(logit)
