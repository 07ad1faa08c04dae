"""The gated delta rule in Triton: see `kernels.delta_rule`, whose letters are used here.

What is between chunks goes through those of a document one after another, a program for a document, a head and some
columns of its state (`_states`, `_dstates`); all else is a program for a chunk and a head. The triangular inverse is
put together from blocks of twice the size, which is as stable as substitution and made of products. Products take
16-bit factors where the inputs have 16 bits, sums and the inverse are fp32. D and F are powers of two (see
`kernels.delta_rule`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.attention import Documents
from pronghorn.kernels.delta_rule import CHUNK, EPS
from pronghorn.kernels.triton.delta_chunks import (
    bounds,
    decays,
    documents,
    inverse_of,
    load,
    load_one,
    lower,
    pairs_of,
    store,
    store_one,
)
from pronghorn.kernels.triton.lora import dot, is_wide

#: most columns of a head of v at a time: of the programs that go through all chunks, and of the others
STATE_COLUMNS, COLUMNS = 32, 64
#: warps of the programs that hold three or more tiles [C, D] at once
GRADIENT_WARPS = 8
#: heads a program of `_units` takes
_HEADS = 16


# --- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _units(
    q_ptr, k_ptr, unit_q_ptr, unit_k_ptr, rows, heads, q_stride, k_stride, scale, eps,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """q̂ and k̂ [T, K, D]."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    known = (row < rows)[:, None]
    token, head = (row // heads).to(tl.int64), row % heads
    to = row[:, None].to(tl.int64) * D + column[None, :]
    inner = head[:, None] * D + column[None, :]
    dtype: tl.constexpr = unit_q_ptr.dtype.element_ty
    q = tl.load(q_ptr + token[:, None] * q_stride + inner, mask=known, other=0.0).to(tl.float32)
    tl.store(unit_q_ptr + to, (q * (scale * tl.rsqrt(tl.sum(q * q, 1) + eps))[:, None]).to(dtype), mask=known)
    k = tl.load(k_ptr + token[:, None] * k_stride + inner, mask=known, other=0.0).to(tl.float32)
    tl.store(unit_k_ptr + to, (k * tl.rsqrt(tl.sum(k * k, 1) + eps)[:, None]).to(dtype), mask=known)


@triton.jit
def _systems(
    k_ptr, v_ptr, g_ptr, beta_ptr, document_ptr, sums_ptr, inverse_ptr, values_ptr, keys_ptr,
    tokens, k_heads, heads, v_stride, gate_stride, group,
    D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """c, M, U and W of a chunk."""
    start, head = tl.program_id(0) * C, tl.program_id(1)
    dtype: tl.constexpr = values_ptr.dtype.element_ty
    sums = tl.cumsum(load_one(g_ptr + head, start, tokens, gate_stride, C), 0)
    store_one(sums_ptr + head, sums, start, tokens, heads, C)
    beta = load_one(beta_ptr + head, start, tokens, gate_stride, C)
    document, before, _ = documents(document_ptr, start, tokens, C)
    k = load(k_ptr + head // group * D, start, tokens, k_heads * D, tl.arange(0, D), C)
    overlap = dot(k, tl.trans(k), WIDE) * pairs_of(sums, document, C)
    inverse = inverse_of(lower(beta[:, None] * overlap, C), WIDE, C, LEVELS).to(dtype)
    square = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(inverse_ptr + (tl.program_id(0).to(tl.int64) * heads + head) * C * C + square, inverse)
    carried = tl.where(document == before, tl.exp(sums), 0.0)
    scaled = (k.to(tl.float32) * (beta * carried)[:, None]).to(dtype)
    keys = dot(inverse, scaled, WIDE)
    store(keys_ptr + head * D, keys, start, tokens, heads * D, tl.arange(0, D), C)
    for f in tl.static_range(0, F, BF):
        column = f + tl.arange(0, BF)
        v = load(v_ptr + head * F, start, tokens, v_stride, column, C).to(tl.float32)
        values = dot(inverse, (v * beta[:, None]).to(dtype), WIDE)
        store(values_ptr + head * F, values, start, tokens, heads * F, column, C)


@triton.jit
def _states(
    k_ptr, keys_ptr, values_ptr, sums_ptr, document_ptr, bounds_ptr, states_ptr, news_ptr, carried_ptr,
    tokens, k_heads, heads, group, CARRIED: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The states before each chunk, and N: those of chunks that the program's document begins with or spans.

    CARRIED: a document begins with its state there, and leaves the one that it ends with.
    """
    head, column = tl.program_id(1).to(tl.int64), tl.program_id(2) * BF + tl.arange(0, BF)
    inner = tl.arange(0, D)
    dtype: tl.constexpr = news_ptr.dtype.element_ty
    state = tl.zeros([D, BF], tl.float32)
    begin, end = bounds(bounds_ptr)
    carried = (tl.program_id(0) * heads + head) * D * F + inner[:, None] * F + column[None, :]
    if CARRIED:
        state = tl.load(carried_ptr + carried)
    for chunk in range(begin // C, tl.cdiv(end, C)):
        start = chunk * C
        place = (chunk * heads + head) * D * F
        owned = tl.where(start >= begin, tokens, 0)
        at = states_ptr + place + inner[:, None] * F + column[None, :]
        tl.store(at, state.to(dtype), mask=inner[:, None] < owned * D)
        keys = load(keys_ptr + head * D, start, tokens, heads * D, inner, C)
        values = load(values_ptr + head * F, start, tokens, heads * F, column, C).to(tl.float32)
        new = (values - dot(keys, state.to(dtype), WIDE)).to(dtype)
        store(news_ptr + head * F, new, start, owned, heads * F, column, C)
        _, outward, through = decays(sums_ptr + head, document_ptr, start, tokens, heads, C)
        k = load(k_ptr + head // group * D, start, tokens, k_heads * D, inner, C).to(tl.float32)
        state = state * through + dot(tl.trans((k * outward[:, None]).to(dtype)), new, WIDE)
    if CARRIED:
        tl.store(carried_ptr + carried, state)


@triton.jit
def _inside(q, k, sums_ptr, document_ptr, start, tokens, heads, WIDE: tl.constexpr, C: tl.constexpr):
    """q̂ k̂ᵀ and Γ."""
    sums = load_one(sums_ptr, start, tokens, heads, C)
    document, _, _ = documents(document_ptr, start, tokens, C)
    return dot(q, tl.trans(k), WIDE), pairs_of(sums, document, C)


@triton.jit
def _outputs(
    q_ptr, k_ptr, sums_ptr, document_ptr, states_ptr, news_ptr, out_ptr, tokens, k_heads, heads, group,
    D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    start, head = tl.program_id(0) * C, tl.program_id(1)
    inner = tl.arange(0, D)
    dtype: tl.constexpr = news_ptr.dtype.element_ty
    q = load(q_ptr + head // group * D, start, tokens, k_heads * D, inner, C)
    k = load(k_ptr + head // group * D, start, tokens, k_heads * D, inner, C)
    product, pairs = _inside(q, k, sums_ptr + head, document_ptr, start, tokens, heads, WIDE, C)
    inside = (product * pairs).to(dtype)
    carried, _, _ = decays(sums_ptr + head, document_ptr, start, tokens, heads, C)
    reading = (q.to(tl.float32) * carried[:, None]).to(dtype)
    place = states_ptr + (tl.program_id(0).to(tl.int64) * heads + head) * D * F
    for f in tl.static_range(0, F, BF):
        column = f + tl.arange(0, BF)
        state = tl.load(place + inner[:, None] * F + column[None, :])
        new = load(news_ptr + head * F, start, tokens, heads * F, column, C)
        out = dot(reading, state, WIDE) + dot(inside, new, WIDE)
        store(out_ptr + head * F, out, start, tokens, heads * F, column, C)


# --- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _dnews_inside(
    q_ptr, k_ptr, sums_ptr, document_ptr, dout_ptr, dnews_ptr, tokens, k_heads, heads, group,
    D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Pᵀ dout."""
    start, head = tl.program_id(0) * C, tl.program_id(1)
    inner = tl.arange(0, D)
    q = load(q_ptr + head // group * D, start, tokens, k_heads * D, inner, C)
    k = load(k_ptr + head // group * D, start, tokens, k_heads * D, inner, C)
    product, pairs = _inside(q, k, sums_ptr + head, document_ptr, start, tokens, heads, WIDE, C)
    inside = tl.trans((product * pairs).to(dnews_ptr.dtype.element_ty))
    for f in tl.static_range(0, F, BF):
        column = f + tl.arange(0, BF)
        dout = load(dout_ptr + head * F, start, tokens, heads * F, column, C)
        store(dnews_ptr + head * F, dot(inside, dout, WIDE), start, tokens, heads * F, column, C)


@triton.jit
def _dstates(
    q_ptr, k_ptr, keys_ptr, sums_ptr, document_ptr, bounds_ptr, dout_ptr, dstates_ptr, dnews_ptr,
    tokens, k_heads, heads, group,
    D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """dS' of each chunk, and the rest of dN: those of chunks whose last token is the program's document's.

    Of the chunk that another document goes on in, it reads rows of dN to which that one's program adds zero.
    """
    head, column = tl.program_id(1).to(tl.int64), tl.program_id(2) * BF + tl.arange(0, BF)
    inner = tl.arange(0, D)
    dtype: tl.constexpr = dnews_ptr.dtype.element_ty
    dstate = tl.zeros([D, BF], tl.float32)
    begin, end = bounds(bounds_ptr)
    last = tl.cdiv(end, C) - 1
    for back in range(last + 1 - begin // C):
        chunk = last - back
        start = chunk * C
        place = (chunk * heads + head) * D * F
        owned = tl.where(tl.minimum(start + C, tokens) <= end, tokens, 0)
        at = dstates_ptr + place + inner[:, None] * F + column[None, :]
        tl.store(at, dstate.to(dtype), mask=inner[:, None] < owned * D)
        carried, outward, through = decays(sums_ptr + head, document_ptr, start, tokens, heads, C)
        k = load(k_ptr + head // group * D, start, tokens, k_heads * D, inner, C).to(tl.float32)
        dnew = load(dnews_ptr + head * F, start, tokens, heads * F, column, C).to(tl.float32)
        dnew = (dnew + dot((k * outward[:, None]).to(dtype), dstate.to(dtype), WIDE)).to(dtype)
        store(dnews_ptr + head * F, dnew, start, owned, heads * F, column, C)
        q = load(q_ptr + head // group * D, start, tokens, k_heads * D, inner, C).to(tl.float32)
        dout = load(dout_ptr + head * F, start, tokens, heads * F, column, C)
        keys = load(keys_ptr + head * D, start, tokens, heads * D, inner, C)
        dstate = dstate * through + dot(tl.trans((q * carried[:, None]).to(dtype)), dout, WIDE)
        dstate -= dot(tl.trans(keys), dnew, WIDE)


@triton.jit
def _output_grads(
    q_ptr, k_ptr, sums_ptr, document_ptr, states_ptr, dstates_ptr, news_ptr, dout_ptr, dq_ptr, dk_ptr, dsums_ptr,
    tokens, k_heads, heads, group,
    D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """What comes through out and through the state after the chunk: all of dq̂, and shares of dk̂ and of dc."""
    start, head = tl.program_id(0) * C, tl.program_id(1)
    inner = tl.arange(0, D)
    dtype: tl.constexpr = news_ptr.dtype.element_ty
    place = (tl.program_id(0).to(tl.int64) * heads + head) * D * F
    dinside = tl.zeros([C, C], tl.float32)
    dreading, dwriting = tl.zeros([C, D], tl.float32), tl.zeros([C, D], tl.float32)
    kept = tl.zeros([D], tl.float32)
    for f in range(0, F, BF):
        column = f + tl.arange(0, BF)
        state = tl.load(states_ptr + place + inner[:, None] * F + column[None, :])
        dstate = tl.load(dstates_ptr + place + inner[:, None] * F + column[None, :])
        new = load(news_ptr + head * F, start, tokens, heads * F, column, C)
        dout = load(dout_ptr + head * F, start, tokens, heads * F, column, C)
        dinside += dot(dout, tl.trans(new), WIDE)
        dreading += dot(dout, tl.trans(state), WIDE)
        dwriting += dot(new, tl.trans(dstate), WIDE)
        kept += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    q = load(q_ptr + head // group * D, start, tokens, k_heads * D, inner, C)
    k = load(k_ptr + head // group * D, start, tokens, k_heads * D, inner, C)
    product, pairs = _inside(q, k, sums_ptr + head, document_ptr, start, tokens, heads, WIDE, C)
    carried, outward, through = decays(sums_ptr + head, document_ptr, start, tokens, heads, C)
    of_pairs = dinside * pairs
    along = of_pairs * product
    of_pairs = of_pairs.to(dtype)
    dreading *= carried[:, None]
    dwriting *= outward[:, None]
    written = tl.sum(dwriting * k.to(tl.float32), 1)
    dsums = tl.sum(along, 1) - tl.sum(along, 0) - written + tl.sum(dreading * q.to(tl.float32), 1)
    at_end = tl.sum(written, 0) + through * tl.sum(kept, 0)
    dsums += tl.where(tl.arange(0, C) == C - 1, at_end, 0.0)
    dq = dreading + dot(of_pairs, k, WIDE)
    dk = dwriting + dot(tl.trans(of_pairs), q, WIDE)
    store(dq_ptr + head * D, dq, start, tokens, heads * D, inner, C)
    store(dk_ptr + head * D, dk, start, tokens, heads * D, inner, C)
    store_one(dsums_ptr + head, dsums, start, tokens, heads, C)


@triton.jit
def _system_grads(
    k_ptr, v_ptr, beta_ptr, sums_ptr, document_ptr, inverse_ptr, values_ptr, keys_ptr, states_ptr, dnews_ptr,
    dk_ptr, dv_ptr, dsums_ptr, dbeta_ptr, tokens, k_heads, heads, v_stride, gate_stride, group,
    D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """What comes through U and W: dv and dβ, the rest of dk̂, and dg (in place of dc) from all of dc."""
    start, head = tl.program_id(0) * C, tl.program_id(1)
    inner, chunk = tl.arange(0, D), tl.program_id(0).to(tl.int64) * heads + head
    dtype: tl.constexpr = dv_ptr.dtype.element_ty
    square = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    turned = tl.trans(tl.load(inverse_ptr + chunk * C * C + square))
    beta = load_one(beta_ptr + head, start, tokens, gate_stride, C)
    dkeys, dsystem = tl.zeros([C, D], tl.float32), tl.zeros([C, C], tl.float32)
    dbeta = tl.zeros([C], tl.float32)
    for f in range(0, F, BF):
        column = f + tl.arange(0, BF)
        dnew = load(dnews_ptr + head * F, start, tokens, heads * F, column, C)
        dvalues = dot(turned, dnew, WIDE)
        v = load(v_ptr + head * F, start, tokens, v_stride, column, C).to(tl.float32)
        dbeta += tl.sum(dvalues * v, 1)
        store(dv_ptr + head * F, dvalues * beta[:, None], start, tokens, heads * F, column, C)
        state = tl.load(states_ptr + chunk * D * F + inner[:, None] * F + column[None, :])
        dkeys -= dot(dnew, tl.trans(state), WIDE)
        values = load(values_ptr + head * F, start, tokens, heads * F, column, C)
        dsystem -= dot(dvalues.to(dtype), tl.trans(values), WIDE)
    dkeys = dot(turned, dkeys.to(dtype), WIDE)
    keys = load(keys_ptr + head * D, start, tokens, heads * D, inner, C)
    dsystem = lower(dsystem - dot(dkeys.to(dtype), tl.trans(keys), WIDE), C)
    k = load(k_ptr + head // group * D, start, tokens, k_heads * D, inner, C)
    product, pairs = _inside(k, k, sums_ptr + head, document_ptr, start, tokens, heads, WIDE, C)
    carried, _, _ = decays(sums_ptr + head, document_ptr, start, tokens, heads, C)
    of_keys = tl.sum(dkeys * k.to(tl.float32), 1) * carried
    of_overlap = dsystem * pairs
    dbeta += of_keys + tl.sum(of_overlap * product, 1)
    of_overlap *= beta[:, None]
    along = of_overlap * product
    dsums = load_one(dsums_ptr + head, start, tokens, heads, C)
    dsums += tl.sum(along, 1) - tl.sum(along, 0) + of_keys * beta
    dk = load(dk_ptr + head * D, start, tokens, heads * D, inner, C).to(tl.float32)
    both = (of_overlap + tl.trans(of_overlap)).to(dtype)
    dk += dkeys * (beta * carried)[:, None] + dot(both, k, WIDE)
    store(dk_ptr + head * D, dk, start, tokens, heads * D, inner, C)
    store_one(dbeta_ptr + head, dbeta, start, tokens, heads, C)
    store_one(dsums_ptr + head, tl.cumsum(dsums, 0, reverse=True), start, tokens, heads, C)


@triton.jit
def _unit_grads(
    q_ptr, k_ptr, dunit_q_ptr, dunit_k_ptr, dq_ptr, dk_ptr, rows, heads, q_stride, k_stride, scale, eps,
    GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k [T, K, D] from those of q̂ and k̂ for each head of v."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    known = (row < rows)[:, None]
    token, head = (row // heads).to(tl.int64), row % heads
    inner = head[:, None] * D + column[None, :]
    of_q, of_k = tl.zeros([ROWS, D], tl.float32), tl.zeros([ROWS, D], tl.float32)
    for i in tl.static_range(GROUP):
        at = (row[:, None].to(tl.int64) * GROUP + i) * D + column[None, :]
        of_q += tl.load(dunit_q_ptr + at, mask=known, other=0.0).to(tl.float32)
        of_k += tl.load(dunit_k_ptr + at, mask=known, other=0.0).to(tl.float32)
    to = row[:, None].to(tl.int64) * D + column[None, :]
    dtype: tl.constexpr = dq_ptr.dtype.element_ty
    q = tl.load(q_ptr + token[:, None] * q_stride + inner, mask=known, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(q * q, 1) + eps)[:, None]
    unit = q * rstd
    dq = scale * rstd * (of_q - unit * tl.sum(of_q * unit, 1)[:, None])
    tl.store(dq_ptr + to, dq.to(dtype), mask=known)
    k = tl.load(k_ptr + token[:, None] * k_stride + inner, mask=known, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(k * k, 1) + eps)[:, None]
    unit = k * rstd
    tl.store(dk_ptr + to, (rstd * (of_k - unit * tl.sum(of_k * unit, 1)[:, None])).to(dtype), mask=known)


# --- launches -------------------------------------------------------------------------------------------------------


class _Made(NamedTuple):
    """What forward makes, and backward makes again."""

    q: Tensor
    k: Tensor
    sums: Tensor
    inverse: Tensor
    values: Tensor
    keys: Tensor
    states: Tensor
    news: Tensor


def _sizes(q: Tensor, v: Tensor) -> dict[str, int | bool]:
    (of_k, of_v) = q.shape[2], v.shape[2]
    # 16-bit products of 16 columns read beyond their shared memory on an H200 with Triton 3.6.
    wide = is_wide(v) or min(of_k, of_v) < 32
    return {"D": of_k, "F": of_v, "BF": min(of_v, COLUMNS), "WIDE": wide, "C": CHUNK, "num_warps": 4}


def _per_state(sizes: dict[str, int | bool]) -> dict[str, int | bool]:
    """Sizes of the kernels that go through all chunks."""
    return {**sizes, "BF": min(sizes["F"], STATE_COLUMNS)}


def _make(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    docs: Documents,
    document: Tensor,
    carried: Tensor | None = None,
) -> _Made:
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1 and q.stride(1) == k.stride(1) == q.shape[2]
    assert v.stride(1) == v.shape[2] and g.stride() == beta.stride() and g.stride(1) == 1
    (tokens, k_heads, of_k), (_, heads, of_v) = q.shape, v.shape
    chunks, group, sizes = triton.cdiv(tokens, CHUNK), heads // k_heads, _sizes(q, v)
    unit_q, unit_k = (v.new_empty(tokens, k_heads, of_k) for _ in range(2))
    rows = tokens * k_heads
    _units[(triton.cdiv(rows, _HEADS),)](
        q,
        k,
        unit_q,
        unit_k,
        rows,
        k_heads,
        q.stride(0),
        k.stride(0),
        of_k**-0.5,
        EPS,
        D=of_k,
        ROWS=_HEADS,
        num_warps=4,
    )
    sums = g.new_empty(tokens, heads)
    inverse = v.new_empty(chunks, heads, CHUNK, CHUNK)
    values, keys = v.new_empty(tokens, heads, of_v), v.new_empty(tokens, heads, of_k)
    _systems[(chunks, heads)](
        unit_k, v, g, beta, document, sums, inverse, values, keys,
        tokens, k_heads, heads, v.stride(0), g.stride(0), group, **sizes, LEVELS=CHUNK.bit_length() - 1,
    )  # fmt: skip
    states, news = v.new_empty(chunks, heads, of_k, of_v), v.new_empty(tokens, heads, of_v)
    per_state = _per_state(sizes)
    _states[(docs.count, heads, of_v // per_state["BF"])](
        unit_k, keys, values, sums, document, docs.cu_seqlens, states, news, states if carried is None else carried,
        tokens, k_heads, heads, group, CARRIED=carried is not None, **per_state,
    )  # fmt: skip
    return _Made(unit_q, unit_k, sums, inverse, values, keys, states, news)


def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, docs: Documents) -> Tensor:
    document = docs.document_of_token(v.shape[0])
    return _read(_make(q, k, v, g, beta, docs, document), v, document)


def forward_continued(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, docs: Documents, states: Tensor
) -> Tensor:
    """`forward` of documents that each take whole chunks, and begin with the states [documents, N, D, F], which become
    those that they end with."""
    assert states.is_contiguous() and states.dtype == torch.float32
    # The number that stands for the token before the first: every chunk goes on where one ended.
    document = torch.full((v.shape[0],), -2, dtype=torch.int32, device=v.device)
    return _read(_make(q, k, v, g, beta, docs, document, states), v, document)


def _read(made: _Made, v: Tensor, document: Tensor) -> Tensor:
    """out [T, N, F]."""
    (tokens, k_heads, _), heads = made.q.shape, v.shape[1]
    out = v.new_empty(v.shape)
    _outputs[(triton.cdiv(tokens, CHUNK), heads)](
        made.q, made.k, made.sums, document, made.states, made.news, out, tokens, k_heads, heads, heads // k_heads,
        **_sizes(made.q, v),
    )  # fmt: skip
    return out


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, docs: Documents
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert dout.is_contiguous()
    (tokens, k_heads, of_k), (_, heads, of_v) = q.shape, v.shape
    document = docs.document_of_token(tokens)
    made = _make(q, k, v, g, beta, docs, document)
    grid, group, sizes = (triton.cdiv(tokens, CHUNK), heads), heads // k_heads, _sizes(q, v)
    shared = (tokens, k_heads, heads, group)
    dnews, dstates = v.new_empty(v.shape), torch.empty_like(made.states)
    _dnews_inside[grid](made.q, made.k, made.sums, document, dout, dnews, *shared, **sizes)
    per_state = _per_state(sizes)
    _dstates[(docs.count, heads, of_v // per_state["BF"])](
        made.q,
        made.k,
        made.keys,
        made.sums,
        document,
        docs.cu_seqlens,
        dout,
        dstates,
        dnews,
        *shared,
        **per_state,
    )
    dunit_q, dunit_k = (v.new_empty(tokens, heads, of_k) for _ in range(2))
    dsums, dbeta = torch.empty_like(made.sums), torch.empty_like(made.sums)
    _output_grads[grid](
        made.q, made.k, made.sums, document, made.states, dstates, made.news, dout, dunit_q, dunit_k, dsums,
        *shared, **{**sizes, "num_warps": GRADIENT_WARPS},
    )  # fmt: skip
    dv = v.new_empty(v.shape)
    _system_grads[grid](
        made.k, v, beta, made.sums, document, made.inverse, made.values, made.keys, made.states, dnews, dunit_k, dv,
        dsums, dbeta, tokens, k_heads, heads, v.stride(0), g.stride(0), group, **{**sizes, "num_warps": GRADIENT_WARPS},
    )  # fmt: skip
    dq, dk = (v.new_empty(tokens, k_heads, of_k) for _ in range(2))
    rows = tokens * k_heads
    _unit_grads[(triton.cdiv(rows, _HEADS),)](
        q, k, dunit_q, dunit_k, dq, dk, rows, k_heads, q.stride(0), k.stride(0), of_k**-0.5, EPS,
        GROUP=group, D=of_k, ROWS=_HEADS, num_warps=4,
    )  # fmt: skip
    return dq, dk, dv, dsums, dbeta
