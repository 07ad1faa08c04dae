"""A decoder layer as one autograd node: attention block, then GLU block, with the saves of its level."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pronghorn.blocks.attention import AttentionBlock, AttentionSaves
from pronghorn.blocks.glu import GluBlock, GluSaves
from pronghorn.blocks.levels import Level
from pronghorn.blocks.projection import GradientSink
from pronghorn.errors import BackwardTwice


@dataclass
class LayerSaves:
    """What one layer keeps besides its input."""

    attention: AttentionSaves
    glu: GluSaves

    def tensors(self) -> list[Tensor]:
        """All kept tensors, for counting and for moving them elsewhere."""
        kept = [*vars(self.attention).values(), *vars(self.glu).values()]
        return [t for t in kept if isinstance(t, Tensor)]


class InputStash(Protocol):
    """Where a layer at level "offload" parks its input; `memory.HostStash` is one."""

    def park(self, x: Tensor) -> int: ...

    def fetch(self, index: int, device: torch.device) -> Tensor: ...


@dataclass(frozen=True)
class DecoderLayer:
    """One layer of a pre-norm decoder, ready to run: x -> x + attention(norm(x)) -> y + glu(norm(y)).

    `dtype` is the compute dtype; the residual stream keeps the dtype of the layer's input. Without a `stash` the level
    "offload" keeps the input on its device, as "none" does.
    """

    attention: AttentionBlock
    glu: GluBlock
    level: Level
    dtype: torch.dtype
    stash: InputStash | None = None
    parameters: list[Tensor] = field(default_factory=list)

    @staticmethod
    def build(
        attention: AttentionBlock,
        glu: GluBlock,
        level: Level,
        dtype: torch.dtype,
        stash: InputStash | None = None,
    ) -> DecoderLayer:
        unique = {id(t): t for t in attention.trainable() + glu.trainable()}
        return DecoderLayer(attention, glu, level, dtype, stash, list(unique.values()))

    def __call__(self, x: Tensor) -> Tensor:
        """Hidden states [T, H] -> [T, H]. Keeps nothing when no gradient can be asked for."""
        if not torch.is_grad_enabled() or not (x.requires_grad or self.parameters):
            return self.forward(x, "none")[0]
        return _DecoderLayerFunction.apply(self, x, *self.parameters)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, level: Level) -> tuple[Tensor, LayerSaves]:
        branch, attention_saves = self.attention.forward(x, self.dtype)
        attention_saves.trim(level)
        out, glu_saves = self.glu.forward(x, branch, self.dtype, level)
        return out, LayerSaves(attention_saves, glu_saves)

    def backward(
        self, dout: Tensor, x: Tensor, saves: LayerSaves, sink: GradientSink, need: bool
    ) -> Tensor | None:
        self.attention.rebuild(x, self.dtype, saves.attention)
        if saves.glu.summed is None:
            branch = self.attention.output(saves.attention)
            self.glu.rebuild(x, branch, self.dtype, saves.glu)
            del branch
        dsummed = self.glu.backward(dout, self.dtype, saves.glu, sink)
        saves.glu = GluSaves()
        return self.attention.backward(dsummed, x, self.dtype, saves.attention, sink, need)


class _DecoderLayerFunction(torch.autograd.Function):
    """Glue between `DecoderLayer` and autograd. Arguments: the layer, x [T, H], then its trainable tensors."""

    @staticmethod
    def forward(ctx: Any, layer: DecoderLayer, x: Tensor, *parameters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            out, ctx.saves = layer.forward(x, layer.level)
        ctx.layer = layer
        ctx.parked, ctx.device = None, x.device
        if layer.level == "offload" and layer.stash is not None:
            ctx.parked = layer.stash.park(x)
        else:
            ctx.save_for_backward(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        if ctx.saves is None:
            raise BackwardTwice(
                "backward ran twice through one forward of a decoder layer, whose kept activations the first used up",
                fix="run the forward again, or undo the fast path with binding_of(model).undo() for retain_graph=True",
            )
        saves, ctx.saves = ctx.saves, None
        x = ctx.saved_tensors[0] if ctx.parked is None else ctx.layer.stash.fetch(ctx.parked, ctx.device)
        wanted = [p for p, need in zip(ctx.layer.parameters, ctx.needs_input_grad[2:], strict=True) if need]
        sink = GradientSink(wanted)
        with torch.autocast(x.device.type, enabled=False):
            dx = ctx.layer.backward(grad_outputs[0].contiguous(), x, saves, sink, ctx.needs_input_grad[1])
        gradients = {id(p): g for p, g in zip(wanted, sink.gradients, strict=True)}
        return None, dx, *(gradients.get(id(p)) for p in ctx.layer.parameters)
