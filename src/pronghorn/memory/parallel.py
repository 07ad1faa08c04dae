"""The allocations of a layer whose attention and MLP stand side by side.

This follows `blocks.layer.ParallelLayer` line by line, as `memory.schedule` follows `DecoderLayer`.
"""

from __future__ import annotations

from pronghorn.blocks import Level, keeps
from pronghorn.memory.products import OUT, Held
from pronghorn.memory.schedule import Step


class ParallelStep(Step):
    """A step of a model with such layers."""

    def _output(self, level: Level, saves: Held) -> int:
        shape, t, e = self.shape, self.tokens, self.element
        # Both blocks hold the norm's output.
        self._keep(saves, "normed_attention", t * shape.hidden * e)
        out = self._glu_forward(level, saves)
        self._attention(saves)
        self._keep(saves, "xa_o", t * shape.rank(*OUT) * e)
        self._add("o", t)
        self._trim_attention(level, saves)
        if keeps(level, "all"):
            saves["normed_glu"] = saves.pop("normed_attention")
        else:
            self._drop(saves, "normed_attention")
        return out

    def _input_gradient(self, level: Level, saves: Held, need: bool) -> int:
        through_glu, _ = self._glu_backward(saves)
        if "normed_glu" in saves:
            saves["normed_attention"] = saves.pop("normed_glu")
        self._drop_glu(saves)
        self._attention(saves)
        dout_o = self._input_grad(OUT, self.tokens, "xa_o" in saves)
        dx = self._attention_backward(saves, dout_o, need)
        self._free(through_glu)
        return dx
