"""A decoder layer as one autograd node: attention block, then GLU block, with the saves of its level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pronghorn.blocks import long_rows
from pronghorn.blocks.attention import AttentionBlock
from pronghorn.blocks.attention_output import OutputSaves
from pronghorn.blocks.glu import GluBlock
from pronghorn.blocks.levels import Level, is_roomy, keeps, parks
from pronghorn.blocks.projection import GradientSink
from pronghorn.errors import BackwardTwice
from pronghorn.weights import Operand
from pronghorn.weights.operand import Turned


class AttentionPart(Protocol):
    """The first half of a layer, up to the residual sum; `AttentionBlock` is one.

    `Saves` is a dataclass of tensors or None with what `OutputSaves` names.
    """

    Saves: ClassVar[type[Any]]

    def trainable(self) -> list[Tensor]: ...

    def rebuild(self, x: Tensor, dtype: torch.dtype, saves: Any) -> None: ...

    def output(self, saves: Any) -> Tensor: ...

    def onto(self, x: Tensor, saves: Any) -> tuple[Tensor, Tensor | None]: ...

    def columns_of_dy(self) -> Tensor | Turned | None: ...

    def backward(
        self,
        dy: Tensor | Operand,
        x: Tensor,
        dtype: torch.dtype,
        saves: Any,
        sink: GradientSink,
        need: bool,
    ) -> Tensor | None: ...


class MlpBlock(Protocol):
    """The second half of a layer, from the residual sum on; `GluBlock` is one.

    `Saves` is a dataclass of tensors or None, `summed` [T, H] (the residual sum) among them.
    """

    Saves: ClassVar[type[Any]]

    def trainable(self) -> list[Tensor]: ...

    def add_residual(self, x: Tensor, branch: Tensor | None, dtype: torch.dtype, saves: Any) -> None: ...

    def forward(self, dtype: torch.dtype, level: Level, saves: Any) -> Tensor: ...

    def backward(
        self,
        dout: Tensor,
        dtype: torch.dtype,
        saves: Any,
        sink: GradientSink,
        columns: Tensor | Turned | None = None,
    ) -> Operand: ...


@dataclass
class LayerSaves:
    """What one layer keeps besides its input; `glu` is what its MLP block keeps."""

    attention: OutputSaves
    glu: Any

    def tensors(self) -> list[Tensor]:
        """All kept tensors, for counting and for moving them elsewhere."""
        return [getattr(saves, name) for saves, name in self._held()]

    def take(self) -> Callable[[Sequence[Tensor]], LayerSaves]:
        """Let go of the tensors; what is returned makes the same record of others (their copies) in this order."""
        held = self._held()
        for saves, name in held:
            setattr(saves, name, None)

        def put(tensors: Sequence[Tensor]) -> LayerSaves:
            for (saves, name), tensor in zip(held, tensors, strict=True):
                setattr(saves, name, tensor)
            return self

        return put

    def _held(self) -> list[tuple[Any, str]]:
        parts = (self.attention, self.glu)
        return [(saves, name) for saves in parts for name, value in vars(saves).items() if value is not None]


class Stash(Protocol):
    """Where a layer at a level that parks puts what it keeps; `memory.HostStash` is one."""

    def park(self, tensors: Sequence[Tensor]) -> int: ...

    def fetch(self, index: int, device: torch.device) -> list[Tensor]: ...


@dataclass(frozen=True)
class DecoderLayer:
    """One layer of a decoder, ready to run: x -> y = x + attention(norm(x)) -> y + glu(norm(y)).

    `dtype` is the compute dtype; the residual stream keeps the dtype of the layer's input. Without a `stash` the levels
    that park keep the same tensors on their device. `owns_gradients`: nobody else reads the gradient of the layer's
    output, so that the one of its input may be written over it.
    """

    attention: AttentionPart
    glu: MlpBlock
    level: Level
    dtype: torch.dtype
    stash: Stash | None = None
    parameters: list[Tensor] = field(default_factory=list)
    owns_gradients: bool = False

    @staticmethod
    def build(
        attention: AttentionPart,
        glu: MlpBlock,
        level: Level,
        dtype: torch.dtype,
        stash: Stash | None = None,
        owns_gradients: bool = False,
    ) -> DecoderLayer:
        """A layer whose kind is that of its MLP block."""
        unique = {id(t): t for t in attention.trainable() + glu.trainable()}
        beside = isinstance(glu, GluBlock) and glu.beside_attention
        kind = ParallelLayer if beside else DecoderLayer
        return kind(
            attention,  # type: ignore[arg-type]
            glu,  # type: ignore[arg-type]
            level,
            dtype,
            stash,
            list(unique.values()),
            owns_gradients,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Hidden states [T, H] -> [T, H]. Keeps nothing when no gradient can be asked for."""
        if not torch.is_grad_enabled() or not (x.requires_grad or self.parameters):
            return self.forward(x, "none")[0]
        return _DecoderLayerFunction.apply(self, x, *self.parameters)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, level: Level) -> tuple[Tensor, LayerSaves]:
        saves = LayerSaves(self.attention.Saves(), self.glu.Saves())
        if self._splits(x, level):
            return long_rows.forward(self, x), saves
        self._attend(x, saves)
        saves.attention.trim(level)
        return self.glu.forward(self.dtype, level, saves.glu), saves

    def backward(
        self, dout: Tensor, x: Tensor, saves: LayerSaves, sink: GradientSink, need: bool
    ) -> Tensor | None:
        if self._splits(x, self.level):
            return long_rows.backward(self, dout, x, saves.attention, sink, need)
        self._attend(x, saves)
        dsummed = self.glu.backward(dout, self.dtype, saves.glu, sink, self.attention.columns_of_dy())
        saves.glu = self.glu.Saves()
        return self.attention.backward(dsummed, x, self.dtype, saves.attention, sink, need)

    def _splits(self, x: Tensor, level: Level) -> bool:
        """Whether rows are so long that they, and heads, go apart (`blocks.long_rows`)."""
        return long_rows.is_long(x.nbytes, level) and long_rows.can_split(self, x.shape[0])

    def _attend(self, x: Tensor, saves: LayerSaves) -> None:
        """Compute whatever is missing in `saves` up to the residual sum."""
        self.attention.rebuild(x, self.dtype, saves.attention)
        if not keeps(self.level, "all"):
            # Cheaper made again for the gradients of A than held through the GLU block.
            saves.attention.normed = None
        if saves.glu.summed is None:
            # Where memory is short the sum is made behind the norm: before it, it leaves holes that nothing else fills
            # (8B within 17.5 GiB: 17.67 GiB reserved instead of 17.40 at most).
            if is_roomy([self.level]):
                parts = self.attention.onto(x, saves.attention)
            else:
                parts = x, self.attention.output(saves.attention)
            self.glu.add_residual(*parts, self.dtype, saves.glu)


@dataclass(frozen=True)
class ParallelLayer(DecoderLayer):
    """A layer whose attention and MLP read the same norm: x -> y = x + attention(norm(x)) + glu(norm(x)).

    The norm is there once, and no residual sum between the two: nothing of the attention is rebuilt for the MLP.
    """

    attention: AttentionBlock
    glu: GluBlock

    def forward(self, x: Tensor, level: Level) -> tuple[Tensor, LayerSaves]:
        of_attention, of_glu = self.attention.Saves(), self.glu.Saves()
        self.glu.add_residual(x, None, self.dtype, of_glu)
        of_attention.normed = of_glu.normed
        out = self.glu.forward(self.dtype, level, of_glu)
        self.attention.rebuild(x, self.dtype, of_attention)
        self.attention.add_output_(out, of_attention)
        of_attention.trim(level)
        # Kept as x and, at "all", by the other block.
        of_glu.summed = of_attention.normed = None
        return out, LayerSaves(of_attention, of_glu)

    def backward(
        self, dout: Tensor, x: Tensor, saves: LayerSaves, sink: GradientSink, need: bool
    ) -> Tensor | None:
        of_attention: Any = saves.attention
        saves.glu.summed = x
        through_glu = self.glu.backward(dout, self.dtype, saves.glu, sink).tensor
        of_attention.normed, saves.glu = saves.glu.normed, self.glu.Saves()
        self.attention.rebuild(x, self.dtype, of_attention)
        return self.attention.backward(dout, x, self.dtype, of_attention, sink, need, through_glu)


class _DecoderLayerFunction(torch.autograd.Function):
    """Glue between `DecoderLayer` and autograd. Arguments: the layer, x [T, H], then its trainable tensors."""

    @staticmethod
    def forward(ctx: Any, layer: DecoderLayer, x: Tensor, *parameters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            out, saves = layer.forward(x, layer.level)
        ctx.layer, ctx.saves, ctx.device = layer, saves, x.device
        ctx.parked = ctx.put = None
        if layer.stash is not None and parks(layer.level):
            kept = [x, *saves.tensors()]
            ctx.put = saves.take()
            ctx.parked = layer.stash.park(kept)
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
        if ctx.parked is None:
            (x,) = ctx.saved_tensors
        else:
            x, *kept = ctx.layer.stash.fetch(ctx.parked, ctx.device)
            saves = ctx.put(kept)
            # The node outlives this call, with whatever it still refers to.
            ctx.put = None
            del kept
        wanted = [p for p, need in zip(ctx.layer.parameters, ctx.needs_input_grad[2:], strict=True) if need]
        sink = GradientSink(wanted)
        with torch.autocast(x.device.type, enabled=False):
            dx = ctx.layer.backward(grad_outputs[0].contiguous(), x, saves, sink, ctx.needs_input_grad[1])
        gradients = {id(p): g for p, g in zip(wanted, sink.gradients, strict=True)}
        return None, dx, *(gradients.get(id(p)) for p in ctx.layer.parameters)
