"""The gated delta rule (Gated Delta Networks, arXiv 2412.06464) over documents in a row, forward and backward.

A head's state S [D, F] begins each document as zero. With q̂ = q / ‖q‖ / √D, k̂ = k / ‖k‖ (‖x‖² = Σ x² + 1e-6):

    S ← exp(g_t) S;   S ← S + β_t k̂_t (v_t - Sᵀ k̂_t)ᵀ;   out_t = Sᵀ q̂_t

Tokens go in chunks of C (the WY form of DeltaNet, arXiv 2406.06484). With c the sums of g from the chunk's begin,
Γ_ij = exp(c_i - c_j) for j ≤ i, γ_i = exp(c_i), e_j = exp(c_C - c_j), and S the state before the chunk:

    A = strictly lower (β_i Γ_ij k̂_i·k̂_j);   M = (I + A)⁻¹;   U = M (β v);   W = M (β γ k̂);   P = Γ ∘ q̂ k̂ᵀ
    N = U - W S;   out = (γ q̂) S + P N;   S' = γ_C S + (e k̂)ᵀ N

Chunks do not end where documents do. Γ is zero between documents, γ where the token's document began in the chunk, e
where it ended, γ_C where a document began: shapes depend on T alone, and nothing asks the host. Backward goes through
the chunks from the last to the first with dS', the gradient of the state after the chunk:

    dN = Pᵀ dout + (e k̂) dS';   dS = γ_C dS' + (γ q̂)ᵀ dout - Wᵀ dN
    dP = dout Nᵀ;   d(γ q̂) = dout Sᵀ;   d(e k̂) = N dS'ᵀ;   dW = -dN Sᵀ
    d(β v) = Mᵀ dN;   d(β γ k̂) = Mᵀ dW;   dA = -strictly lower (d(β v) Uᵀ + d(β γ k̂) Wᵀ)

and from there to q, k, v, β and, through sums of c's gradients from a chunk's end, to g. States are made again in
backward: only q, k, v, g and β are kept. Arithmetic is fp32 (fp64 for fp64 inputs).

K heads of q and k [T, K, D], N = K · group heads of v [T, N, F]; head n of v goes with head n // group of q and k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from pronghorn.kernels.attention import Documents
from pronghorn.kernels.dispatch import Impl, math_dtype, multiplies_in_triton

#: tokens of a chunk
CHUNK = 64
#: beside the sum of squares, as Transformers has it
EPS = 1e-6


def _runs_in_triton(q: Tensor, v: Tensor, impl: Impl | None) -> bool:
    """Whether the Triton kernels run, which take heads of 16 to 128 (q, k) and of 16 to 256 (v), powers of two.

    In fp32 they do only if asked for: products without matrix units, and minutes to compile at the usual sizes.
    """
    if impl is None and v.dtype == torch.float32:
        return False
    sizes = (q.shape[2], 128), (v.shape[2], 256)
    fit = all(16 <= size <= most and size & (size - 1) == 0 for size, most in sizes)
    return fit and multiplies_in_triton(v, impl)


def delta_rule_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    docs: Documents,
    *,
    impl: Impl | None = None,
) -> Tensor:
    """out [T, N, F] in v's dtype.

    Args:
        q, k, v: heads and elements contiguous; rows may be part of a wider buffer's.
        g, beta: [T, N] in fp32, g ≤ 0.
    """
    if _runs_in_triton(q, v, impl):
        from pronghorn.kernels.triton.delta_rule import forward

        return forward(q, k, v, g, beta, docs)
    chunks = _Chunks.of(q, k, v, g, beta, docs.document_of_token(v.shape[0]))
    return _through(chunks, chunks.zero_state())[0].to(v.dtype)


def delta_rule_continued(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    docs: Documents,
    states: Tensor,
    *,
    impl: Impl | None = None,
) -> Tensor:
    """`delta_rule_forward` where documents begin with states of their own, which become those that they end with.

    Args:
        docs: none of them empty, with lengths that the host knows.
        states: [documents, N, D, F] contiguous, in fp32 (fp64 for fp64 inputs), overwritten.
    """
    if _runs_in_triton(q, v, impl):
        return _continued_in_triton(q, k, v, g, beta, docs, states)
    outs = []
    lengths = list(docs.host_lengths())
    parts = zip(*(x.split(lengths) for x in (q, k, v, g, beta)), strict=True)
    for given, state in zip(parts, states, strict=True):
        out, last = _through(_Chunks.of_one(*given), state)
        state.copy_(last)
        outs.append(out)
    return torch.cat(outs).to(v.dtype)


def _through(chunks: _Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """out [T, N, F] and the state after the last chunk."""
    outs = []
    for i in range(chunks.count):
        new = chunks.values[i] - chunks.keys_of_state[i] @ state
        outs.append(chunks.reading[i] @ state + chunks.inside[i] @ new)
        state = chunks.through[i] * state + chunks.writing[i].mT @ new
    return chunks.rows(torch.stack(outs)), state


def _continued_in_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, docs: Documents, states: Tensor
) -> Tensor:
    """Documents are moved apart, so that each begins with a chunk. What fills them up has β = 0 and g = 0, which leave
    a state as it is."""
    from pronghorn.kernels.triton.delta_rule import forward_continued

    places, apart = docs.derive(("chunks apart",), lambda: _moved_apart(docs.host_lengths(), v.device))
    tokens = sum(apart.host_lengths())
    q, k, v, g, beta = (
        x.new_zeros(tokens, *x.shape[1:]).index_copy_(0, places, x) for x in (q, k, v, g, beta)
    )
    return forward_continued(q, k, v, g, beta, apart, states).index_select(0, places)


def _moved_apart(lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Documents]:
    """Where tokens go so that each document begins with a chunk, int64 [T], and the documents filled up."""
    whole = tuple(-(-length // CHUNK) * CHUNK for length in lengths)
    bounds = [0, *accumulate(whole)]
    places = torch.cat([torch.arange(n) + at for n, at in zip(lengths, bounds, strict=False)])
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    return places.to(device), Documents(offsets, max(whole), whole)


def delta_rule_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    docs: Documents,
    *,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their dtypes, contiguous, and of g and beta [T, N] in fp32."""
    if _runs_in_triton(q, v, impl):
        from pronghorn.kernels.triton.delta_rule import backward

        return backward(dout, q, k, v, g, beta, docs)
    chunks = _Chunks.of(q, k, v, g, beta, docs.document_of_token(v.shape[0]))
    states, news, state = [], [], chunks.zero_state()
    for i in range(chunks.count):
        states.append(state)
        news.append(chunks.values[i] - chunks.keys_of_state[i] @ state)
        state = chunks.through[i] * state + chunks.writing[i].mT @ news[i]
    wide = chunks.chunked(dout)
    inward = chunks.inside.mT @ wide
    after, dnews, dstate = [], [], chunks.zero_state()
    for i in reversed(range(chunks.count)):
        after.append(dstate)
        dnews.append(inward[i] + chunks.writing[i] @ dstate)
        dstate = (
            chunks.through[i] * dstate
            + chunks.reading[i].mT @ wide[i]
            - chunks.keys_of_state[i].mT @ dnews[-1]
        )
    parts = (torch.stack(states), torch.stack(after[::-1]), torch.stack(news), torch.stack(dnews[::-1]))
    dq, dk, dv, dg, dbeta = _chunk_gradients(chunks, wide, *parts)
    dq, dk = (
        _unit_backward(chunks.rows(dx), x, scale)
        for dx, x, scale in ((dq, q, q.shape[2] ** -0.5), (dk, k, 1.0))
    )
    return dq, dk, chunks.rows(dv).to(v.dtype), chunks.rows(dg), chunks.rows(dbeta)


@dataclass(frozen=True)
class _Chunks:
    """A stream's chunks [n, N, C, ...]: q̂ and k̂ (repeated for the heads of v), v, β [n, N, C], c, and the document of
    each token [n, C] with that of the token before the chunk [n]."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    sums: Tensor
    document: Tensor
    before: Tensor
    tokens: int

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, document: Tensor) -> _Chunks:
        ids = torch.nn.functional.pad(document, (0, -document.shape[0] % CHUNK), value=-1).view(-1, CHUNK)
        before = torch.cat([ids.new_full((1,), -2), ids[:-1, -1]])
        return _Chunks.in_documents(q, k, v, g, beta, ids, before)

    @staticmethod
    def of_one(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> _Chunks:
        """Of one document that has begun before, filled up with tokens of no effect."""
        ids = torch.zeros(-(-v.shape[0] // CHUNK), CHUNK, dtype=torch.int32, device=v.device)
        return _Chunks.in_documents(q, k, v, g, beta, ids, ids[:, 0])

    @staticmethod
    def in_documents(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, document: Tensor, before: Tensor
    ) -> _Chunks:
        tokens, group, wide = v.shape[0], v.shape[1] // k.shape[1], math_dtype(v.dtype)
        repeated = [
            (unit(x.to(wide)) * scale).repeat_interleave(group, 1)
            for x, scale in ((q, q.shape[2] ** -0.5), (k, 1.0))
        ]
        unit_q, unit_k, values = (_in_chunks(x.to(wide)) for x in (*repeated, v))
        beta, steps = (_in_chunks(x.to(wide)[..., None])[..., 0] for x in (beta, g))
        return _Chunks(unit_q, unit_k, values, beta, steps.cumsum(-1), document, before, tokens)

    @property
    def count(self) -> int:
        return self.q.shape[0]

    def zero_state(self) -> Tensor:
        return self.v.new_zeros(self.v.shape[1], self.k.shape[-1], self.v.shape[-1])

    def chunked(self, x: Tensor) -> Tensor:
        """[T, N, F] -> [n, N, C, F] in the dtype of the arithmetic."""
        return _in_chunks(x.to(self.v.dtype))

    def rows(self, x: Tensor) -> Tensor:
        """[n, N, C, ...] -> [T, N, ...] contiguous."""
        return x.transpose(1, 2).flatten(0, 1)[: self.tokens].contiguous()

    @cached_property
    def pairs(self) -> Tensor:
        """Γ."""
        known = (self.document[:, :, None] == self.document[:, None, :]).tril()[:, None]
        return (self.sums[..., :, None] - self.sums[..., None, :]).masked_fill(~known, -torch.inf).exp()

    @cached_property
    def carried(self) -> Tensor:
        """γ."""
        known = (self.document == self.before[:, None])[:, None]
        return torch.where(known, self.sums.exp(), 0.0)

    @cached_property
    def outward(self) -> Tensor:
        """e."""
        known = (self.document == self.document[:, -1:])[:, None]
        return torch.where(known, (self.sums[..., -1:] - self.sums).exp(), 0.0)

    @cached_property
    def through(self) -> Tensor:
        """γ_C [n, N, 1, 1]."""
        return self.carried[..., -1:, None]

    @cached_property
    def reading(self) -> Tensor:
        """γ q̂."""
        return self.carried[..., None] * self.q

    @cached_property
    def writing(self) -> Tensor:
        """e k̂."""
        return self.outward[..., None] * self.k

    @cached_property
    def inside(self) -> Tensor:
        """P."""
        return self.pairs * (self.q @ self.k.mT)

    @cached_property
    def overlap(self) -> Tensor:
        """Γ ∘ k̂ k̂ᵀ, strictly lower."""
        return (self.pairs * (self.k @ self.k.mT)).tril(-1)

    @cached_property
    def inverse(self) -> Tensor:
        """M."""
        one = torch.eye(CHUNK, dtype=self.q.dtype, device=self.q.device)
        system = one + self.beta[..., None] * self.overlap
        return torch.linalg.solve_triangular(system, one, upper=False, unitriangular=True)

    @cached_property
    def values(self) -> Tensor:
        """U."""
        return self.inverse @ (self.beta[..., None] * self.v)

    @cached_property
    def scaled_keys(self) -> Tensor:
        """β γ k̂."""
        return (self.beta * self.carried)[..., None] * self.k

    @cached_property
    def keys_of_state(self) -> Tensor:
        """W."""
        return self.inverse @ self.scaled_keys


def _chunk_gradients(
    chunks: _Chunks, dout: Tensor, states: Tensor, dstates: Tensor, news: Tensor, dnews: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q̂, k̂, v, g and β [n, N, C, ...] from those of N and of the states after each chunk; states are those
    before."""
    k, beta, inverse = chunks.k, chunks.beta[..., None], chunks.inverse
    dinside = (dout @ news.mT).tril()
    dreading, dwriting = dout @ states.mT, news @ dstates.mT
    dvalues, dkeys = inverse.mT @ dnews, inverse.mT @ -(dnews @ states.mT)
    dsystem = -(dvalues @ chunks.values.mT + dkeys @ chunks.keys_of_state.mT).tril(-1)
    of_pairs = dinside * chunks.pairs
    of_overlap = dsystem * beta * chunks.pairs
    dq = of_pairs @ k + chunks.carried[..., None] * dreading
    dk = of_pairs.mT @ chunks.q + (of_overlap + of_overlap.mT) @ k
    dk = dk + chunks.outward[..., None] * dwriting + (chunks.beta * chunks.carried)[..., None] * dkeys
    dbeta = (dvalues * chunks.v).sum(-1) + (dkeys * k).sum(-1) * chunks.carried
    dbeta = dbeta + (dsystem * chunks.overlap).sum(-1)
    # Of the exponents c_i - c_j, then of those of γ, e and γ_C.
    along = dinside * chunks.inside + dsystem * beta * chunks.overlap
    written = (dwriting * chunks.writing).sum(-1)
    dsums = along.sum(-1) - along.sum(-2) - written
    dsums = dsums + (dreading * chunks.reading).sum(-1) + (dkeys * chunks.scaled_keys).sum(-1)
    dsums[..., -1] += written.sum(-1) + (chunks.through * states * dstates).sum((-1, -2))
    dg = dsums.flip(-1).cumsum(-1).flip(-1)
    return dq, dk, beta * dvalues, dg, dbeta


def _in_chunks(x: Tensor) -> Tensor:
    """[T, N, D] -> [n, N, C, D], filled up with zeros."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -x.shape[0] % CHUNK))
    return padded.view(-1, CHUNK, *x.shape[1:]).transpose(1, 2)


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


def _unit_backward(dunit: Tensor, x: Tensor, scale: float) -> Tensor:
    """The gradient of x [T, K, D] from that of scale · x / ‖x‖ [T, N, D], one for each head of v."""
    tokens, heads, width = x.shape
    along = dunit.view(tokens, heads, -1, width).sum(2) * scale
    wide = x.to(along.dtype)
    rstd = torch.rsqrt(wide.square().sum(-1, keepdim=True) + EPS)
    unit = wide * rstd
    return (rstd * (along - unit * (along * unit).sum(-1, keepdim=True))).to(x.dtype)
