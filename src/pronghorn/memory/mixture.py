"""Sizes of layers with a mixture of experts, and the allocations of such a layer's second half.

This follows `blocks.moe` line by line, as `memory.schedule` follows the other blocks.
"""

from __future__ import annotations

from functools import cached_property

from pronghorn.blocks import Level, keeps
from pronghorn.memory.parts import MixtureShape
from pronghorn.memory.products import Held
from pronghorn.memory.schedule import Step


class MixtureStep(Step):
    """A step of a model whose layers are mixtures of experts."""

    @property
    def _mixture(self) -> MixtureShape:
        assert self.shape.mixture is not None
        return self.shape.mixture

    def _glu_forward(self, level: Level, saves: Held) -> int:
        """`MoeBlock.forward`: the layer's output."""
        keeps_wide, keeps_sum = keeps(level, "matmuls"), keeps(level, "attention")
        tiles = [slice(0, self.tokens)] if keeps_wide else self._tiles()
        out = self._new(self._residual()) if len(tiles) > 1 else -1
        logits = []
        for at in tiles:
            rows = at.stop - at.start
            routing = self._expand(saves, rows)
            if not keeps(level, "all") and len(tiles) == 1:
                self._drop(saves, "normed_glu")
            act = self._rows(rows, self._mixture.intermediate)
            if not keeps_wide:
                self._drop(saves, "gate_up", "xa_gate_up")
            y = self._product(saves, "down", rows, "xa_down")
            self._free(act)
            part = self._new(rows * self.shape.hidden * self.shape.residual_element)
            self._free(y, *routing)
            if not keeps_wide:
                self._drop(saves, "xa_down")
            if len(tiles) == 1:
                out = part
            else:
                self._free(part)
                logits.append(saves.pop("logits"))
        if len(tiles) > 1 and keeps_sum:
            self._keep(saves, "logits", sum(size for _, size in logits))
        self._free(*[handle for handle, _ in logits])
        if not keeps_sum:
            self._drop(saves, "logits", "summed")
        if not keeps(level, "all"):
            self._drop(saves, "normed_glu")
        return out

    def _glu_backward(self, saves: Held) -> tuple[int, list[int] | None]:
        """`MoeBlock.backward`: the gradient of the residual sum. Gradients of the experts' adapters wait for the
        layer's end (`_layer_backward`)."""
        shape, mixture, e = self.shape, self._mixture, self.element
        kept = "gate_up" in saves
        tiles = [slice(0, self.tokens)] if kept else self._tiles()
        dsummed = self._new(self._residual()) if len(tiles) > 1 else -1
        for at in tiles:
            rows = at.stop - at.start
            routing = self._expand(saves, rows)
            dy = self._rows(rows, shape.hidden)
            dxa, dact = self._input_product("down", rows, mixture.intermediate)
            dweights = self._new(4 * rows * mixture.top_k)
            self._adapter_gradients("down", rows, "xa_down" in saves)
            self._free(dy, dact, dxa)
            self._drop(saves, "xa_down")
            dxa, drows = self._input_product("gate_up", rows, shape.hidden)
            x = self._rows(rows, shape.hidden)
            self._adapter_gradients("gate_up", rows, True)
            self._free(x, dxa)
            self._drop(saves, "gate_up", "xa_gate_up")
            dnormed = self._new(rows * shape.hidden * e)
            self._free(drows)
            read = self._read_by_router(rows)
            dlogits = self._new(rows * mixture.experts * 4)
            drouter = self._new(rows * shape.hidden * self._of_logits)
            self._free(dlogits, drouter, dweights, read)
            part = self._new(rows * shape.hidden * shape.residual_element)
            self._free(dnormed, *routing)
            self._drop(saves, "logits")
            if len(tiles) > 1:
                self._free(part)
                self._drop(saves, "normed_glu")
            else:
                dsummed = part
        self._drop(saves, "normed_glu")
        return dsummed, None

    def _expand(self, saves: Held, rows: int) -> list[int]:
        """`MoeBlock._rebuild`: up to gate and up; what the routing holds."""
        mixture, e = self._mixture, self.element
        if "normed_glu" not in saves:
            self._keep(saves, "normed_glu", rows * self.shape.hidden * e)
            self._free(self._new(4 * rows))
        if "logits" not in saves:
            read = self._read_by_router(rows)
            self._keep(saves, "logits", rows * mixture.experts * self._of_logits)
            self._free(read)
        scores = self._new(4 * rows * mixture.experts)
        pairs = rows * mixture.top_k
        # Experts and weights of a token; sorted experts, their order, tokens and places (8 bytes each), row weights.
        routing = [self._new(size * pairs) for size in (8, 4, 8, 8, 8, 8, 4)]
        self._free(scores)
        if "gate_up" not in saves:
            x = self._rows(rows, self.shape.hidden)
            wide = self._product(saves, "gate_up", rows, "xa_gate_up")
            saves["gate_up"] = (wide, 2 * pairs * mixture.intermediate * e)
            self._free(x)
        return routing

    @property
    def _of_logits(self) -> int:
        """Bytes of a router's logit."""
        return 4 if self._mixture.wide_logits else self.element

    def _read_by_router(self, rows: int) -> int:
        """The router's input, where it is another than the experts'."""
        return self._new(4 * rows * self.shape.hidden) if self._of_logits != self.element else -1

    def _rows(self, tokens: int, width: int) -> int:
        """One row for each expert of each token."""
        return self._new(tokens * self._mixture.top_k * width * self.element)

    def _product(self, saves: Held, stack: str, tokens: int, xa: str) -> int:
        """`ExpertProjection.forward` of a stack."""
        width = 2 * self._mixture.intermediate if stack == "gate_up" else self.shape.hidden
        rank, size = self._mixture.ranks[stack], self._mixture.top_k * self.element
        if rank:
            self._keep(saves, xa, tokens * rank * size)
        copies = self._operands(stack)
        out = self._rows(tokens, width)
        self._free(*copies)
        return out

    def _input_product(self, stack: str, tokens: int, width: int) -> tuple[int, int]:
        """`ExpertProjection.input_grad`: dXA and dX."""
        dxa = self._rows(tokens, self._mixture.ranks[stack])
        copies = self._operands(stack)
        dx = self._rows(tokens, width)
        self._free(*copies)
        return dxa, dx

    def _operands(self, stack: str) -> list[int]:
        """A and B in the compute dtype, and the stack where it is stored in another one."""
        mixture = self._mixture
        out, width = mixture.sizes(self.shape.hidden)[stack]
        rank, stored = mixture.ranks[stack], self.shape.storage_of_stacks
        found = [self._new(mixture.experts * rank * side * self.element) for side in (out, width) if rank]
        if stored.startswith("nf4"):
            found.append(self._new(mixture.experts * out * width * self.element))
        return found

    def _layer_backward(self, index: int, level: Level, dout: int) -> int:
        dx = super()._layer_backward(index, level, dout)
        self._free(*self._gradients.values())
        self._gradients.clear()
        return dx

    @cached_property
    def _gradients(self) -> dict[tuple[str, str], int]:
        """Those of a layer's adapters on stacks, by stack and side."""
        return {}

    def _adapter_gradients(self, stack: str, tokens: int, with_xa: bool) -> None:
        """`ExpertProjection.parameter_grads`: dA and dB in fp32, B's turned into PEFT's order."""
        mixture = self._mixture
        out, width = mixture.sizes(self.shape.hidden)[stack]
        rank = mixture.ranks[stack]
        size = 4 * mixture.experts * rank
        if not size:
            return
        self._give(stack, "a", size * width)
        xa = -1
        if not with_xa:
            copy = self._new(mixture.experts * rank * width * self.element)
            xa = self._rows(tokens, rank)
            self._free(copy)
        turned = self._new(size * out)
        self._give(stack, "b", size * out)
        self._free(turned, xa)

    def _give(self, stack: str, side: str, size: int) -> None:
        """`GradientSink.add`: the sum with what earlier tiles gave is a new tensor."""
        made, held = self._new(size), self._gradients.get((stack, side))
        self._gradients[stack, side] = made if held is None else self._new(size)
        if held is not None:
            self._free(made, held)
