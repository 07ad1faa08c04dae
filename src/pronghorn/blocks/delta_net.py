"""The block of linear attention by the gated delta rule (Gated Delta Networks, arXiv 2412.06464), as Qwen3-Next and
Qwen3.5 have it:

    n = norm(x);   [q | k | v] = silu(conv(W n));   z, b, a = further projections of n
    block = o(norm(rule(q, k, v, g(a), β(b))) · silu(z))

The convolution and the rule begin anew with each document (`kernels.short_conv`, `kernels.delta_rule`). What the
products and the rule give is kept; the convolution, the gates and the rule's states are made again in backward, which
costs no product with a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pronghorn.blocks.attention_output import AttentionOutput
from pronghorn.blocks.head_groups import groups_of
from pronghorn.blocks.levels import Level, keeps
from pronghorn.blocks.norm import Norm
from pronghorn.blocks.projection import GradientSink, ProjectionGroup
from pronghorn.kernels.attention import Documents
from pronghorn.kernels.delta_gates import delta_gates_backward, delta_gates_forward
from pronghorn.kernels.delta_rule import delta_rule_backward, delta_rule_forward
from pronghorn.kernels.gated_output import gated_output_backward, gated_output_forward
from pronghorn.kernels.short_conv import short_conv_backward, short_conv_forward
from pronghorn.weights import Operand
from pronghorn.weights.operand import as_operand


@dataclass
class DeltaSaves:
    """Tensors between forward and backward; None means dropped by the save level and rebuilt when needed."""

    #: what the rule gave [T, N, F]
    out: Tensor | None = None
    #: q, k and v side by side before the convolution [T, 2 K·D + N·F]
    mixed: Tensor | None = None
    #: [T, N, F]
    z: Tensor | None = None
    #: [T, N] each
    b: Tensor | None = None
    a: Tensor | None = None
    xa_inputs: Tensor | None = None
    xa_o: Tensor | None = None
    projected: Tensor | None = None
    normed: Tensor | None = None

    def trim(self, level: Level) -> None:
        """Drop what the level does not keep."""
        if not keeps(level, "attention"):
            self.out = self.mixed = self.z = self.b = self.a = self.xa_inputs = self.xa_o = self.projected = (
                None
            )
        if not keeps(level, "all"):
            self.normed = None


@dataclass(frozen=True)
class DeltaHeads:
    """Heads of q and k (K of D) and of v (N of F, N a multiple of K), and how the projections lay them out.

    `by_keys`: two projections give [q | k | v | z] and [b | a] of one head of k after the other, with the heads of v
    that go with it; else four give [q | k | v], z, b and a.
    """

    keys: int
    key_dim: int
    values: int
    value_dim: int
    by_keys: bool = False

    def apart(self, outputs: list[Tensor]) -> list[Tensor]:
        """[q | k | v] [T, C], z [T, N·F], b and a [T, N] of what the projections give."""
        if not self.by_keys:
            return outputs
        group = self.values // self.keys
        qkvz, ba = (x.view(x.shape[0], self.keys, -1) for x in outputs)
        wide = group * self.value_dim
        *qkv, z = (x.flatten(1) for x in qkvz.split([self.key_dim, self.key_dim, wide, wide], 2))
        return [torch.cat(qkv, 1), z, *(x.flatten(1) for x in ba.chunk(2, 2))]

    def together(self, dqkv: Tensor, dz: Tensor, db: Tensor, da: Tensor) -> list[Tensor]:
        """Gradients of the projections' outputs from those of `apart`'s."""
        if not self.by_keys:
            return [dqkv, dz, db, da]
        by_keys = [x.view(x.shape[0], self.keys, -1) for x in (*self.split(dqkv), dz)]
        of_gates = [x.view(x.shape[0], self.keys, -1) for x in (db, da)]
        return [torch.cat(by_keys, 2).flatten(1), torch.cat(of_gates, 2).flatten(1)]

    def groups(self, tokens: int) -> list[tuple[slice, slice]]:
        """Heads of q and k, and those of v that go with them, which are done together (`blocks.head_groups`)."""
        count = groups_of(tokens, self.keys)
        few, many = self.keys // count, self.values // count
        return [(slice(i * few, (i + 1) * few), slice(i * many, (i + 1) * many)) for i in range(count)]

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [T, K, D] and v [T, N, F], views of [T, C]."""
        width = self.keys * self.key_dim
        q, k, v = qkv.split([width, width, self.values * self.value_dim], 1)
        tokens = qkv.shape[0]
        return (
            q.view(tokens, self.keys, self.key_dim),
            k.view(tokens, self.keys, self.key_dim),
            v.view(tokens, self.values, self.value_dim),
        )


@dataclass(frozen=True, kw_only=True)
class DeltaNetBlock(AttentionOutput):
    """One layer's linear attention.

    Args:
        inputs: what reads the layer's norm, as `heads` says.
        conv: [C, 1, W], and its bias [C] or None. decay, dt_bias: [N] (`kernels.delta_gates`).
        head_norm: of the rule's output, per head of v, before its gate.
    """

    norm: Norm
    inputs: ProjectionGroup
    heads: DeltaHeads
    conv: Tensor
    conv_bias: Tensor | None
    decay: Tensor
    dt_bias: Tensor
    head_norm: Norm
    docs: Documents

    Saves: ClassVar[type[DeltaSaves]] = DeltaSaves

    def trainable(self) -> list[Tensor]:
        own = [t for t in self._own if t is not None and t.requires_grad]
        parts = (self.norm, self.inputs, self.head_norm, self.o)
        return own + [t for part in parts for t in part.trainable()]

    @property
    def _own(self) -> tuple[Tensor | None, ...]:
        return self.conv, self.conv_bias, self.decay, self.dt_bias

    def rebuild(self, x: Tensor, dtype: torch.dtype, saves: DeltaSaves) -> None:
        """Compute whatever is missing in `saves` up to the rule's output."""
        if saves.out is not None:
            return
        found, _ = self.norm.forward(x, dtype, fp8=self.inputs.quantises_rows, int8=self.inputs.turns_rows)
        saves.normed = found.tensor
        outputs, saves.xa_inputs = self.inputs.forward(found)
        del found
        saves.mixed, z, saves.b, saves.a = self.heads.apart(outputs)
        saves.z = z.view(-1, self.heads.values, self.heads.value_dim)
        del outputs, z
        saves.out = self._rule(saves)

    def _rule(self, saves: DeltaSaves) -> Tensor:
        """What the rule gives [T, N, F]; of a long stream for some heads at a time, whose states take much room."""
        q, k, v, g, beta, docs = self._rule_inputs(saves)
        groups = self.heads.groups(v.shape[0])
        if len(groups) == 1:
            return delta_rule_forward(q, k, v, g, beta, docs)
        out = v.new_empty(v.shape)
        for few, many in groups:
            out[:, many] = delta_rule_forward(
                q[:, few], k[:, few], v[:, many], g[:, many], beta[:, many], docs
            )
        return out

    def _rule_backward(self, dout: Tensor, saves: DeltaSaves) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of [q | k | v] [T, C], g and β [T, N], heads as in `_rule`."""
        q, k, v, g, beta, docs = self._rule_inputs(saves)
        groups = self.heads.groups(v.shape[0])
        if len(groups) == 1:
            *parts, dg, dbeta = delta_rule_backward(dout, q, k, v, g, beta, docs)
            return torch.cat([x.flatten(1) for x in parts], 1), dg, dbeta
        joined = v.new_empty(v.shape[0], self.conv.shape[0])
        dg, dbeta = torch.empty_like(g), torch.empty_like(beta)
        dq, dk, dv = self.heads.split(joined)
        for few, many in groups:
            dq[:, few], dk[:, few], dv[:, many], dg[:, many], dbeta[:, many] = delta_rule_backward(
                dout[:, many].contiguous(), q[:, few], k[:, few], v[:, many], g[:, many], beta[:, many], docs
            )
        return joined, dg, dbeta

    def _rule_inputs(self, saves: DeltaSaves) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Documents]:
        """q, k, v, g, β and the documents."""
        mixed, a, b = saves.mixed, saves.a, saves.b
        assert mixed is not None and a is not None and b is not None
        document = self.docs.document_of_token(mixed.shape[0])
        qkv = short_conv_forward(mixed, self.conv[:, 0], self.conv_bias, document)
        return *self.heads.split(qkv), *delta_gates_forward(a, b, self.decay, self.dt_bias), self.docs

    def read_by_o(self, saves: DeltaSaves) -> Tensor:
        """norm(out) · silu(z) [T, N·F]."""
        assert saves.out is not None and saves.z is not None
        norm = self.head_norm
        return gated_output_forward(saves.out, saves.z, weight=norm.weight, eps=norm.eps).flatten(1)

    def backward(
        self,
        dy: Tensor | Operand,
        x: Tensor,
        dtype: torch.dtype,
        saves: DeltaSaves,
        sink: GradientSink,
        need: bool,
    ) -> Tensor | None:
        """dX [T, H] including the residual path (None unless `need`); `saves` rebuilt before, consumed here."""
        given = as_operand(dy)
        dy = given.tensor
        dread = self.output_grad(given, dtype, saves, sink)
        del given
        dout, dz = self._gate_grads(dread, saves, sink)
        del dread
        joined, dg, dbeta = self._rule_backward(dout, saves)
        del dout
        dinputs = self._input_grads(joined, dz, dg, dbeta, saves, sink)
        del joined, dz, dg, dbeta
        if saves.normed is None:
            saves.normed = self.norm.forward(x, dtype)[0].tensor
        need_normed = need or sink.wants(self.norm.weight)
        dnormed, dxa = self.inputs.input_grad(dinputs, saves.normed, sink, need_normed, xa=saves.xa_inputs)
        self.inputs.parameter_grads(dinputs, saves.normed, saves.xa_inputs, dxa, sink)
        del dinputs
        if dnormed is None:
            return None
        dx = self.norm.backward(dnormed, x, dy, sink).tensor
        return dx if need else None

    def _gate_grads(self, dread: Tensor, saves: DeltaSaves, sink: GradientSink) -> tuple[Tensor, Tensor]:
        """Gradients of the rule's output and of z, from that of what o read [T, N, F]."""
        assert saves.out is not None and saves.z is not None
        norm = self.head_norm
        dout, dz, dweight = gated_output_backward(
            dread,
            saves.out,
            saves.z,
            weight=norm.weight,
            eps=norm.eps,
            need_weight_grad=sink.wants(norm.weight),
        )
        if dweight is not None:
            sink.add(norm.weight, dweight)
        saves.out = saves.z = None
        return dout, dz

    def _input_grads(
        self, dqkv: Tensor, dz: Tensor, dg: Tensor, dbeta: Tensor, saves: DeltaSaves, sink: GradientSink
    ) -> list[Tensor]:
        """Gradients of what the projections of the layer's input gave, from those of what the convolution and the gates
        made of it."""
        mixed, a, b = saves.mixed, saves.a, saves.b
        assert mixed is not None and a is not None and b is not None
        dmixed, dconv, dconv_bias = short_conv_backward(
            dqkv,
            mixed,
            self.conv[:, 0],
            self.conv_bias,
            self.docs.document_of_token(mixed.shape[0]),
            need_weight_grad=sink.wants(self.conv) or sink.wants(self.conv_bias),
        )
        saves.mixed = None
        da, db, ddecay, ddt_bias = delta_gates_backward(dg, dbeta, a, b, self.decay, self.dt_bias)
        for parameter, gradient in zip(self._own, (dconv, dconv_bias, ddecay, ddt_bias), strict=True):
            if parameter is not None and gradient is not None:
                sink.add(parameter, gradient.view_as(parameter))
        return self.heads.together(dmixed, dz.flatten(1), db, da)
