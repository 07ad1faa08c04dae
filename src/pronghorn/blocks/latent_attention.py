"""The attention block of DeepSeek's latent attention (arXiv 2405.04434): heads of q, k and v come from narrow codes.

    n = norm(x);   c_q = Wa n;   [c | k_rope] = Wb n
    q = Uq norm(c_q), or q = Wq n;   [k_nope | v] = U norm(c);   k = [k_nope | R k_rope],   q = [q_nope | R q_rope]
    block = o(attention(q, k, v))

A product with the codes gives an element of q, k or v for a fraction of what one with the layer's input costs, so that
of the save levels only "all" keeps q, k and v; the others keep what the first products give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pronghorn.blocks.attention_output import AttentionOutput
from pronghorn.blocks.head_groups import grouped_attention_backward
from pronghorn.blocks.levels import Level, keeps
from pronghorn.blocks.norm import Norm
from pronghorn.blocks.projection import GradientSink, ProjectionGroup
from pronghorn.kernels.attention import AttentionCall, Documents, attention_forward
from pronghorn.kernels.latent_heads import latent_heads_backward, latent_heads_forward
from pronghorn.weights import Operand
from pronghorn.weights.operand import as_operand


@dataclass
class LatentSaves:
    """Tensors between forward and backward; None means dropped by the save level and rebuilt when needed.

    q [T, N, E + P] and k are as the attention sees them, v [T, N, F]. What the norms of the codes give is never kept.
    """

    out: Tensor | None = None
    lse: Tensor | None = None
    #: c_q [T, Rq] where q has a code; where it has none, q is kept in its place
    code_q: Tensor | None = None
    #: [c | k_rope], [T, R + P]
    code_kv: Tensor | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    xa_codes: Tensor | None = None
    xa_q: Tensor | None = None
    xa_kv: Tensor | None = None
    xa_o: Tensor | None = None
    projected: Tensor | None = None
    normed: Tensor | None = None

    def trim(self, level: Level) -> None:
        """Drop what the level does not keep."""
        if not keeps(level, "all"):
            self.k = self.v = self.xa_q = self.xa_kv = None
            if self.code_q is not None:
                self.q = None
        if not keeps(level, "attention"):
            self.q = self.code_q = self.code_kv = self.out = self.lse = self.xa_codes = self.xa_o = None
            self.projected = None
        if not keeps(level, "all"):
            self.normed = None


@dataclass(frozen=True)
class Raised:
    """A code's norm and the projection that makes heads of it."""

    norm: Norm
    up: ProjectionGroup

    def trainable(self) -> list[Tensor]:
        return self.norm.trainable() + self.up.trainable()

    def forward(self, code: Tensor) -> tuple[Tensor, Tensor | None]:
        """up(norm(code)) [T, out] of [T, R], and the adapters' XA."""
        (raised,), xa = self.up.forward(normed(self.norm, code, code.dtype, self.up))
        return raised, xa

    def backward(self, draised: Tensor, code: Tensor, xa: Tensor | None, sink: GradientSink) -> Tensor:
        """The gradient of the code."""
        found = self.norm.forward(code, code.dtype)[0].tensor
        dnormed, dxa = self.up.input_grad([draised], found, sink, xa=xa)
        self.up.parameter_grads([draised], found, xa, dxa, sink)
        assert dnormed is not None
        return self.norm.backward(dnormed, code, None, sink).tensor


def normed(norm: Norm, x: Tensor, dtype: torch.dtype, reader: ProjectionGroup) -> Operand:
    """The norm of x, quantised on the way where `reader`'s products take it so."""
    return norm.forward(x, dtype, fp8=reader.quantises_rows, int8=reader.turns_rows)[0]


@dataclass(frozen=True, kw_only=True)
class LatentAttentionBlock(AttentionOutput):
    """One layer's latent attention. T tokens, N heads of E + P (q, k) and F (v), codes of Rq and R.

    Args:
        codes: what reads the layer's norm: c_q or q, then [c | k_rope].
        q_up: from c_q to q; None where there is no c_q. `kv_up`: from c to k_nope and v of every head.
        nope: E. cos, sin: [T, P / 2]. `pairs`: R turns neighbouring elements, not halves.
    """

    norm: Norm
    codes: ProjectionGroup
    q_up: Raised | None
    kv_up: Raised
    heads: int
    nope: int
    cos: Tensor
    sin: Tensor
    pairs: bool
    docs: Documents
    call: AttentionCall

    Saves: ClassVar[type[LatentSaves]] = LatentSaves

    def trainable(self) -> list[Tensor]:
        parts = (self.norm, self.codes, self.q_up, self.kv_up, self.o, self.output_norm)
        return [t for part in parts if part is not None for t in part.trainable()]

    def rebuild(self, x: Tensor, dtype: torch.dtype, saves: LatentSaves) -> None:
        """Compute whatever is missing in `saves` up to the attention output."""
        if saves.out is not None:
            return
        q = None
        if saves.code_kv is None:
            found = normed(self.norm, x, dtype, self.codes)
            saves.normed = found.tensor
            (first, saves.code_kv), saves.xa_codes = self.codes.forward(found)
            del found
            if self.q_up is None:
                q = first.view(-1, self.heads, first.shape[1] // self.heads)
            else:
                saves.code_q = first
            del first
        self._raise_codes(saves, q)
        assert saves.q is not None and saves.k is not None and saves.v is not None
        saves.out, saves.lse = attention_forward(saves.q, saves.k, saves.v, self.docs, self.call)

    def _raise_codes(self, saves: LatentSaves, q: Tensor | None = None) -> None:
        """q, k and v as the attention sees them from the codes; `q` just made, not yet rotated."""
        if saves.k is not None:
            return
        assert saves.code_kv is not None
        code, shared = self._parts(saves.code_kv)
        if self.q_up is not None:
            assert saves.code_q is not None
            wide, saves.xa_q = self.q_up.forward(saves.code_q)
            q = wide.view(wide.shape[0], self.heads, -1)
            del wide
        pair, saves.xa_kv = self.kv_up.forward(code)
        pair = pair.view(pair.shape[0], self.heads, -1)
        saves.k, saves.v = latent_heads_forward(
            q, pair, shared, self.cos, self.sin, nope=self.nope, pairs=self.pairs
        )
        saves.q = saves.q if q is None else q

    def _parts(self, code_kv: Tensor) -> tuple[Tensor, Tensor]:
        """c [T, R] and k_rope [T, P]."""
        width = 2 * self.cos.shape[1]
        return code_kv[:, :-width], code_kv[:, -width:]

    def backward(
        self,
        dy: Tensor | Operand,
        x: Tensor,
        dtype: torch.dtype,
        saves: LatentSaves,
        sink: GradientSink,
        need: bool,
    ) -> Tensor | None:
        """dX [T, H] including the residual path (None unless `need`); `saves` rebuilt before, consumed here."""
        given = as_operand(dy)
        dy = given.tensor
        dout = self.output_grad(given, dtype, saves, sink)
        del given
        self._raise_codes(saves)
        q, k, v, out, lse = saves.q, saves.k, saves.v, saves.out, saves.lse
        assert q is not None and k is not None and v is not None and out is not None and lse is not None
        dq, dk, dv = grouped_attention_backward(dout, q, k, v, out, lse, self.docs, self.call)
        del dout, q, k, v, out, lse
        saves.q = saves.k = saves.v = saves.out = saves.lse = None
        dcodes = self._code_grads(dq, dk, dv, saves, sink)
        del dq, dk, dv
        need_normed = need or sink.wants(self.norm.weight)
        if saves.normed is None:
            saves.normed = self.norm.forward(x, dtype)[0].tensor
        dnormed, dxa = self.codes.input_grad(dcodes, saves.normed, sink, need_normed, xa=saves.xa_codes)
        self.codes.parameter_grads(dcodes, saves.normed, saves.xa_codes, dxa, sink)
        del dcodes
        if dnormed is None:
            return None
        dx = self.norm.backward(dnormed, x, dy, sink).tensor
        return dx if need else None

    def _code_grads(
        self, dq: Tensor, dk: Tensor, dv: Tensor, saves: LatentSaves, sink: GradientSink
    ) -> list[Tensor]:
        """Gradients of what the first products gave, from those of what the attention saw; dq is used up."""
        assert saves.code_kv is not None
        dpair, dshared = latent_heads_backward(dq, dk, dv, self.cos, self.sin, pairs=self.pairs)
        del dk, dv
        code, _ = self._parts(saves.code_kv)
        dcode = self.kv_up.backward(dpair.flatten(1), code, saves.xa_kv, sink)
        del dpair
        dkv = torch.cat([dcode, dshared], 1)
        if self.q_up is None:
            return [dq.flatten(1), dkv]
        assert saves.code_q is not None
        return [self.q_up.backward(dq.flatten(1), saves.code_q, saves.xa_q, sink), dkv]
