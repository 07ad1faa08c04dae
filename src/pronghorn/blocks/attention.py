"""The attention block: norm, q/k/v, optional q/k norm, RoPE, attention, o, optional norm or factor of what it gives.

Explicit forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pronghorn.blocks import joining
from pronghorn.blocks.attention_output import AttentionOutput
from pronghorn.blocks.head_groups import grouped_attention_backward
from pronghorn.blocks.levels import Level, keeps
from pronghorn.blocks.norm import NoNorm, Norm
from pronghorn.blocks.projection import GradientSink, ProjectionGroup
from pronghorn.kernels.attention import AttentionCall, Documents, attention_forward, attention_sink_grad
from pronghorn.kernels.gated_output import gated_output_backward, gated_output_forward
from pronghorn.kernels.qkv_grads import unrotate_joined, unrotate_joined_fp8
from pronghorn.kernels.rope import adapted_rope_, qk_rope_backward, qk_rope_forward
from pronghorn.weights import DenseWeight, Fp8Weight, Int8Products, Operand
from pronghorn.weights.operand import as_operand


@dataclass
class AttentionSaves:
    """Tensors between forward and backward; None means dropped by the save level and rebuilt when needed.

    q, k are the projections' outputs when there is a q/k norm, else already rotated (a rotation is undone by its
    transpose, so nothing else is needed).
    """

    out: Tensor | None = None
    lse: Tensor | None = None
    #: [T, N, D], where the q-projection gives a gate of the output besides
    gate: Tensor | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    xa_qkv: Tensor | None = None
    xa_o: Tensor | None = None
    #: what the o-projection gave, where a norm of it follows
    projected: Tensor | None = None
    normed: Tensor | None = None

    def trim(self, level: Level) -> None:
        """Drop what the level does not keep."""
        if not keeps(level, "attention"):
            self.q = self.k = self.v = self.out = self.lse = self.xa_qkv = self.xa_o = None
            self.projected = self.gate = None
        if not keeps(level, "all"):
            self.normed = None


@dataclass(frozen=True, kw_only=True)
class AttentionBlock(AttentionOutput):
    """One layer's attention: output_scale · output_norm(o(attention(query_scale · Rq, Rk, v))) of q, k, v of norm(x).

    cos and sin are [T, Drot] with Drot ≤ D; T tokens, H hidden, N heads, K kv-heads, D head size. `query_scale` is
    [T, 1, 1]. `pairs`: R turns neighbouring elements of a head, not halves. `output_norm` and `output_scale` come
    between the o-projection and the residual sum. With `gated`, where q and k have norms, the q-projection gives q and
    a gate of each head [T, N, 2D], and o reads attention(…) · σ(gate).
    """

    norm: Norm | NoNorm
    qkv: ProjectionGroup
    heads: int
    kv_heads: int
    head_dim: int
    cos: Tensor
    sin: Tensor
    docs: Documents
    call: AttentionCall
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    pairs: bool = False
    query_scale: Tensor | None = None
    gated: bool = False

    Saves: ClassVar[type[AttentionSaves]] = AttentionSaves

    def trainable(self) -> list[Tensor]:
        norms = [n for n in (self.norm, self.q_norm, self.k_norm, self.output_norm) if n is not None]
        sinks = self.call.sinks
        own = [] if sinks is None or not sinks.requires_grad else [sinks]
        return own + [t for n in norms for t in n.trainable()] + self.qkv.trainable() + self.o.trainable()

    def rebuild(self, x: Tensor, dtype: torch.dtype, saves: AttentionSaves) -> None:
        """Compute whatever is missing in `saves` up to the attention output."""
        self.make_heads(x, dtype, saves)
        self.attend(saves)

    def make_heads(self, x: Tensor, dtype: torch.dtype, saves: AttentionSaves) -> None:
        """q, k and v, where they are missing in `saves`."""
        if saves.q is None:
            normed = self._normed(x, dtype, saves)
            # A norm on q and k needs whole inputs in its backward; a rotation takes the adapters in on the way.
            defers = self.q_norm is None
            turns_whole = self.head_dim == self.cos.shape[1] and not self.pairs
            whole = defers and turns_whole and not self.gated
            made, xa = self.qkv.rotated_heads(normed, self.cos, self.sin) if whole else (None, None)
            defers = defers and made is None
            if made is None:
                joined = defers and self.qkv.total_rank > 0
                joined = joined and joining.joins_qkv_forward(x.shape[0], self.kv_heads * self.head_dim)
                made, xa = self.qkv.forward(normed, defer_adapters=defers, xa=xa, joined=joined)
            (q, k, v), saves.xa_qkv = made, xa
            del normed, made
            saves.q, saves.gate = self._query_and_gate(q)
            saves.k = k.view(-1, self.kv_heads, self.head_dim)
            saves.v = v.view(-1, self.kv_heads, self.head_dim)
            del q, k, v
            if defers:
                self._rotate(saves)
            if self.q_norm is None:
                self._scale_(saves.q)

    def attend(self, saves: AttentionSaves) -> None:
        """The attention's output of q, k and v, where it is missing in `saves`."""
        if saves.out is None:
            assert saves.v is not None
            q, k = self._rotated(saves)
            saves.out, saves.lse = attention_forward(q, k, saves.v, self.docs, self.call)

    def _normed(self, x: Tensor, dtype: torch.dtype, saves: AttentionSaves) -> Operand:
        """The norm of x, which may be there."""
        if saves.normed is not None:
            return Operand(saves.normed)
        normed, _ = self.norm.forward(x, dtype, fp8=self.qkv.quantises_rows, int8=self.qkv.turns_rows)
        if not isinstance(self.norm, NoNorm):
            saves.normed = normed.tensor
        return normed

    def _query_and_gate(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the q-projection gives [T, N·D], or with a gate [T, N·2D], by heads."""
        if not self.gated:
            return q.view(-1, self.heads, self.head_dim), None
        query, gate = q.view(-1, self.heads, 2 * self.head_dim).chunk(2, 2)
        return query.contiguous(), gate.contiguous()

    def read_by_o(self, saves: AttentionSaves) -> Tensor:
        """The attention's output, or what its gate leaves of it."""
        if saves.gate is None:
            return super().read_by_o(saves)
        assert saves.out is not None
        return gated_output_forward(saves.out, saves.gate).flatten(1)

    def _rotate(self, saves: AttentionSaves) -> None:
        """Rotate q and k, after adding to q, k and v what the projections left to be added: in place, or where they are
        columns of one matrix into new tensors."""
        q, k, v, xa = saves.q, saves.k, saves.v, saves.xa_qkv
        assert q is not None and k is not None and v is not None
        adapters = (self.qkv.deferred(0, xa), self.qkv.deferred(1, xa), self.qkv.deferred(2, xa))
        apart = all(x.is_contiguous() for x in (q, k, v))
        if adapters == (None, None, None):
            rotated = qk_rope_forward(q, k, self.cos, self.sin, inplace=apart, pairs=self.pairs)
            if not apart:
                (saves.q, saves.k), saves.v = rotated, v.contiguous()
            return
        into = None if apart else (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
        adapted_rope_(q, k, v, self.cos, self.sin, adapters, into=into, pairs=self.pairs)
        if into is not None:
            saves.q, saves.k, saves.v = into

    def _rotated(self, saves: AttentionSaves) -> tuple[Tensor, Tensor]:
        """q and k as the attention sees them."""
        assert saves.q is not None and saves.k is not None
        if self.q_norm is None or self.k_norm is None:
            return saves.q, saves.k
        if self.norms_apart:
            q, k = self.q_norm.of_heads(saves.q), self.k_norm.of_heads(saves.k)
            q, k = qk_rope_forward(q, k, self.cos, self.sin, inplace=True, pairs=self.pairs)
        else:
            q, k = qk_rope_forward(
                saves.q,
                saves.k,
                self.cos,
                self.sin,
                q_norm_weight=self.q_norm.weight,
                k_norm_weight=self.k_norm.weight,
                eps=self.q_norm.eps,
                weight_offset=self.q_norm.offset,
                pairs=self.pairs,
            )
        self._scale_(q)
        return q, k

    @property
    def norms_apart(self) -> bool:
        """Whether the norms of q and k are not the one of a head that the rotation takes in."""
        return self.q_norm is not None and not self.q_norm.is_of_a_head(self.head_dim)

    def _scale_(self, q: Tensor | None) -> None:
        """Rotated queries by their factors, or the gradients of what these gave; in place."""
        if self.query_scale is not None and q is not None:
            q.mul_(self.query_scale)

    def backward(
        self,
        dy: Tensor | Operand,
        x: Tensor,
        dtype: torch.dtype,
        saves: AttentionSaves,
        sink: GradientSink,
        need: bool,
        residual_grad: Tensor | None = None,
    ) -> Tensor | None:
        """dX [T, H] including the residual path (None unless `need`), whose gradient is dy unless it is given; `saves`
        rebuilt before, consumed here."""
        given = as_operand(dy)
        dy = given.tensor
        dout = self.output_grad(given, dtype, saves, sink)
        del given
        out, lse, v = saves.out, saves.lse, saves.v
        assert out is not None and lse is not None and v is not None
        dgate = None
        if saves.gate is not None:
            dout, dgate, _ = gated_output_backward(dout, out, saves.gate)
            saves.gate = None
        dout = dout.view_as(out)
        if sink.wants(self.call.sinks):
            sink.add(self.call.sinks, attention_sink_grad(dout, out, lse, self.call))
        q, k = self._rotated(saves)
        dq, dk, dv = grouped_attention_backward(dout, q, k, v, out, lse, self.docs, self.call, over=True)
        self._scale_(dq)
        saves.out = saves.lse = saves.v = None
        del out, dout, v, q, k
        heads = [dq, dk, dv, dgate]
        del dq, dk, dv, dgate
        return self.through_projections(
            heads, x, dtype, saves, sink, need, dy if residual_grad is None else residual_grad
        )

    def through_projections(
        self,
        heads: list[Tensor | None],
        x: Tensor,
        dtype: torch.dtype,
        saves: AttentionSaves,
        sink: GradientSink,
        need: bool,
        residual_grad: Tensor,
    ) -> Tensor | None:
        """The end of `backward`, from the gradients of what the attention saw (q, k, v, the gate or None), which are
        taken out of `heads`."""
        dq, dk, dv, dgate = heads
        assert dq is not None and dk is not None and dv is not None
        heads.clear()
        need_normed = need or sink.wants(self.norm.weight)
        dys, of_stack = self._projection_grads(dq, dk, dv, dgate, saves, sink, need_normed)
        del dq, dk, dv, dgate
        saves.q = saves.k = None
        if saves.normed is None:
            saves.normed = self.norm.forward(x, dtype)[0].tensor
        normed = saves.normed
        dnormed, dxa = self.qkv.input_grad(dys, normed, sink, need_normed, xa=saves.xa_qkv, of_stack=of_stack)
        del of_stack
        self.qkv.parameter_grads(dys, normed, saves.xa_qkv, dxa, sink)
        if dnormed is None:
            return None
        dx = self.norm.backward(dnormed, x, residual_grad, sink).tensor
        return dx if need else None

    def seen_heads(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as the attention sees them."""
        saves = AttentionSaves()
        self.make_heads(x, dtype, saves)
        saves.normed = saves.xa_qkv = None
        q, k = self._rotated(saves)
        assert saves.v is not None
        return q, k, saves.v

    def of_rows(self, at: slice) -> AttentionBlock:
        """The block for some rows of the stream; not for the attention itself, which sees all of them."""
        scale = None if self.query_scale is None else self.query_scale[at]
        return replace(self, cos=self.cos[at], sin=self.sin[at], query_scale=scale)

    def _projection_grads(
        self,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dgate: Tensor | None,
        saves: AttentionSaves,
        sink: GradientSink,
        need_input: bool,
    ) -> tuple[list[Tensor], Operand | None]:
        """Gradients of the projections' outputs [T, out] from those of what the attention saw, side by side where their
        weights are multiplied as one; and quantised for a stack in fp8."""
        stack, columns = self.qkv.stack, self.qkv.fp8_columns()
        if need_input and self.q_norm is None:
            if columns is not None and isinstance(stack, Fp8Weight):
                parts, rows = unrotate_joined_fp8(
                    dq, dk, dv, self.cos, self.sin, stack.columns, pairs=self.pairs
                )
                return parts, Operand(parts[0], rows, stack.columns)
            if self.qkv.is_one_matrix or (
                joining.QKV_INPUT_GRAD and isinstance(stack, DenseWeight | Int8Products)
            ):
                return self.qkv.of_outputs(
                    unrotate_joined(dq, dk, dv, self.cos, self.sin, pairs=self.pairs)
                ), None
        dq, dk = self._rope_backward(dq, dk, saves, sink)
        dq = dq if dgate is None else torch.cat([dq, dgate], 2)
        return self.qkv.of_outputs([g.reshape(g.shape[0], -1) for g in (dq, dk, dv)]), None

    def _rope_backward(
        self, dq: Tensor, dk: Tensor, saves: AttentionSaves, sink: GradientSink
    ) -> tuple[Tensor, Tensor]:
        if self.q_norm is None or self.k_norm is None or self.norms_apart:
            dq, dk, _, _ = qk_rope_backward(dq, dk, self.cos, self.sin, inplace=True, pairs=self.pairs)
            if self.q_norm is None or self.k_norm is None:
                return dq, dk
            assert saves.q is not None and saves.k is not None
            dq = self.q_norm.of_heads_backward(dq, saves.q, sink)
            return dq, self.k_norm.of_heads_backward(dk, saves.k, sink)
        dq, dk, dq_weight, dk_weight = qk_rope_backward(
            dq,
            dk,
            self.cos,
            self.sin,
            q=saves.q,
            k=saves.k,
            q_norm_weight=self.q_norm.weight,
            k_norm_weight=self.k_norm.weight,
            eps=self.q_norm.eps,
            weight_offset=self.q_norm.offset,
            need_weight_grad=sink.wants(self.q_norm.weight) or sink.wants(self.k_norm.weight),
            pairs=self.pairs,
        )
        if dq_weight is not None and dk_weight is not None:
            sink.add(self.q_norm.weight, dq_weight)
            sink.add(self.k_norm.weight, dk_weight)
        return dq, dk
