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
from pronghorn.kernels.triton.lora import dot, is_wide

#: most columns of a head of v at a time: of the programs that go through all chunks, and of the others
STATE_COLUMNS, COLUMNS = 32, 64
#: warps of the programs that hold three or more tiles [C, D] at once
GRADIENT_WARPS = 8
#: heads a program of `_units` takes
_HEADS = 16


# --- parts of a chunk -----------------------------------------------------------------------------------------------


@triton.jit
def _load(ptr, start, tokens, stride, column, C: tl.constexpr):
    """Rows of a chunk, zero beyond the stream."""
    row = start + tl.arange(0, C)
    at = ptr + row[:, None].to(tl.int64) * stride + column[None, :]
    return tl.load(at, mask=(row < tokens)[:, None], other=0.0)


@triton.jit
def _store(ptr, value, start, tokens, stride, column, C: tl.constexpr):
    row = start + tl.arange(0, C)
    at = ptr + row[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=(row < tokens)[:, None])


@triton.jit
def _load_one(ptr, start, tokens, stride, C: tl.constexpr):
    """A number of each token of a chunk, in fp32."""
    row = start + tl.arange(0, C)
    return tl.load(ptr + row.to(tl.int64) * stride, mask=row < tokens, other=0.0).to(tl.float32)


@triton.jit
def _store_one(ptr, value, start, tokens, stride, C: tl.constexpr):
    row = start + tl.arange(0, C)
    tl.store(ptr + row.to(tl.int64) * stride, value, mask=row < tokens)


@triton.jit
def _documents(document_ptr, start, tokens, C: tl.constexpr):
    """Documents of a chunk's tokens, of the token before it, and of its last one; none of these is alike where there is
    no token."""
    row = start + tl.arange(0, C)
    document = tl.load(document_ptr + row, mask=row < tokens, other=-1)
    before = tl.load(document_ptr + start - 1, mask=start > 0, other=-2)
    last = tl.load(document_ptr + start + C - 1, mask=start + C - 1 < tokens, other=-3)
    return document, before, last


@triton.jit
def _bounds(bounds_ptr):
    """Where the program's document begins and ends; an empty one has no chunks."""
    begin = tl.load(bounds_ptr + tl.program_id(0))
    end = tl.load(bounds_ptr + tl.program_id(0) + 1)
    return begin, tl.where(end > begin, end, 0)


@triton.jit
def _decays(sums_ptr, document_ptr, start, tokens, heads, C: tl.constexpr):
    """γ, e and γ_C."""
    sums = _load_one(sums_ptr, start, tokens, heads, C)
    document, before, last = _documents(document_ptr, start, tokens, C)
    end = tl.load(sums_ptr + (start + C - 1) * heads, mask=start + C - 1 < tokens, other=0.0)
    carried = tl.where(document == before, tl.exp(sums), 0.0)
    outward = tl.where(document == last, tl.exp(tl.minimum(end - sums, 0.0)), 0.0)
    return carried, outward, tl.where(last == before, tl.exp(end), 0.0)


@triton.jit
def _pairs(sums, document, C: tl.constexpr):
    """Γ [C, C]."""
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    known = (document[:, None] == document[None, :]) & (row >= column)
    return tl.where(known, tl.exp(tl.minimum(sums[:, None] - sums[None, :], 0.0)), 0.0)


@triton.jit
def _lower(x, C: tl.constexpr):
    """x strictly below the diagonal."""
    return tl.where(tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :], x, 0.0)


@triton.jit
def _inverse(system, WIDE: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr):
    """(I + system)⁻¹ of a strictly lower system: [[X, 0], [-Y B X, Y]] of the inverses X, Y of neighbouring blocks."""
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    below = (row // 2 == column // 2) & (row != column)
    found = tl.where(row == column, 1.0, 0.0) - tl.where(below, system, 0.0)
    for level in tl.static_range(1, LEVELS):
        size = 1 << level
        below = (row // size == column // size + 1) & ((column // size) % 2 == 0)
        block = tl.where(below, system, 0.0)
        if WIDE:
            found -= tl.dot(tl.dot(found, block, input_precision="ieee"), found, input_precision="ieee")
        else:
            found -= tl.dot(tl.dot(found, block, input_precision="tf32x3"), found, input_precision="tf32x3")
    return found


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
    sums = tl.cumsum(_load_one(g_ptr + head, start, tokens, gate_stride, C), 0)
    _store_one(sums_ptr + head, sums, start, tokens, heads, C)
    beta = _load_one(beta_ptr + head, start, tokens, gate_stride, C)
    document, before, _ = _documents(document_ptr, start, tokens, C)
    k = _load(k_ptr + head // group * D, start, tokens, k_heads * D, tl.arange(0, D), C)
    overlap = dot(k, tl.trans(k), WIDE) * _pairs(sums, document, C)
    inverse = _inverse(_lower(beta[:, None] * overlap, C), WIDE, C, LEVELS).to(dtype)
    square = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(inverse_ptr + (tl.program_id(0).to(tl.int64) * heads + head) * C * C + square, inverse)
    carried = tl.where(document == before, tl.exp(sums), 0.0)
    scaled = (k.to(tl.float32) * (beta * carried)[:, None]).to(dtype)
    keys = dot(inverse, scaled, WIDE)
    _store(keys_ptr + head * D, keys, start, tokens, heads * D, tl.arange(0, D), C)
    for f in tl.static_range(0, F, BF):
        column = f + tl.arange(0, BF)
        v = _load(v_ptr + head * F, start, tokens, v_stride, column, C).to(tl.float32)
        values = dot(inverse, (v * beta[:, None]).to(dtype), WIDE)
        _store(values_ptr + head * F, values, start, tokens, heads * F, column, C)


@triton.jit
def _states(
    k_ptr, keys_ptr, values_ptr, sums_ptr, document_ptr, bounds_ptr, states_ptr, news_ptr,
    tokens, k_heads, heads, group,
    D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The states before each chunk, and N: those of chunks that the program's document begins with or spans."""
    head, column = tl.program_id(1).to(tl.int64), tl.program_id(2) * BF + tl.arange(0, BF)
    inner = tl.arange(0, D)
    dtype: tl.constexpr = news_ptr.dtype.element_ty
    state = tl.zeros([D, BF], tl.float32)
    begin, end = _bounds(bounds_ptr)
    for chunk in range(begin // C, tl.cdiv(end, C)):
        start = chunk * C
        place = (chunk * heads + head) * D * F
        owned = tl.where(start >= begin, tokens, 0)
        at = states_ptr + place + inner[:, None] * F + column[None, :]
        tl.store(at, state.to(dtype), mask=inner[:, None] < owned * D)
        keys = _load(keys_ptr + head * D, start, tokens, heads * D, inner, C)
        values = _load(values_ptr + head * F, start, tokens, heads * F, column, C).to(tl.float32)
        new = (values - dot(keys, state.to(dtype), WIDE)).to(dtype)
        _store(news_ptr + head * F, new, start, owned, heads * F, column, C)
        _, outward, through = _decays(sums_ptr + head, document_ptr, start, tokens, heads, C)
        k = _load(k_ptr + head // group * D, start, tokens, k_heads * D, inner, C).to(tl.float32)
        state = state * through + dot(tl.trans((k * outward[:, None]).to(dtype)), new, WIDE)


@triton.jit
def _inside(q, k, sums_ptr, document_ptr, start, tokens, heads, WIDE: tl.constexpr, C: tl.constexpr):
    """q̂ k̂ᵀ and Γ."""
    sums = _load_one(sums_ptr, start, tokens, heads, C)
    document, _, _ = _documents(document_ptr, start, tokens, C)
    return dot(q, tl.trans(k), WIDE), _pairs(sums, document, C)


@triton.jit
def _outputs(
    q_ptr, k_ptr, sums_ptr, document_ptr, states_ptr, news_ptr, out_ptr, tokens, k_heads, heads, group,
    D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    start, head = tl.program_id(0) * C, tl.program_id(1)
    inner = tl.arange(0, D)
    dtype: tl.constexpr = news_ptr.dtype.element_ty
    q = _load(q_ptr + head // group * D, start, tokens, k_heads * D, inner, C)
    k = _load(k_ptr + head // group * D, start, tokens, k_heads * D, inner, C)
    product, pairs = _inside(q, k, sums_ptr + head, document_ptr, start, tokens, heads, WIDE, C)
    inside = (product * pairs).to(dtype)
    carried, _, _ = _decays(sums_ptr + head, document_ptr, start, tokens, heads, C)
    reading = (q.to(tl.float32) * carried[:, None]).to(dtype)
    place = states_ptr + (tl.program_id(0).to(tl.int64) * heads + head) * D * F
    for f in tl.static_range(0, F, BF):
        column = f + tl.arange(0, BF)
        state = tl.load(place + inner[:, None] * F + column[None, :])
        new = _load(news_ptr + head * F, start, tokens, heads * F, column, C)
        out = dot(reading, state, WIDE) + dot(inside, new, WIDE)
        _store(out_ptr + head * F, out, start, tokens, heads * F, column, C)


# --- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _dnews_inside(
    q_ptr, k_ptr, sums_ptr, document_ptr, dout_ptr, dnews_ptr, tokens, k_heads, heads, group,
    D: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Pᵀ dout."""
    start, head = tl.program_id(0) * C, tl.program_id(1)
    inner = tl.arange(0, D)
    q = _load(q_ptr + head // group * D, start, tokens, k_heads * D, inner, C)
    k = _load(k_ptr + head // group * D, start, tokens, k_heads * D, inner, C)
    product, pairs = _inside(q, k, sums_ptr + head, document_ptr, start, tokens, heads, WIDE, C)
    inside = tl.trans((product * pairs).to(dnews_ptr.dtype.element_ty))
    for f in tl.static_range(0, F, BF):
        column = f + tl.arange(0, BF)
        dout = _load(dout_ptr + head * F, start, tokens, heads * F, column, C)
        _store(dnews_ptr + head * F, dot(inside, dout, WIDE), start, tokens, heads * F, column, C)


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
    begin, end = _bounds(bounds_ptr)
    last = tl.cdiv(end, C) - 1
    for back in range(last + 1 - begin // C):
        chunk = last - back
        start = chunk * C
        place = (chunk * heads + head) * D * F
        owned = tl.where(tl.minimum(start + C, tokens) <= end, tokens, 0)
        at = dstates_ptr + place + inner[:, None] * F + column[None, :]
        tl.store(at, dstate.to(dtype), mask=inner[:, None] < owned * D)
        carried, outward, through = _decays(sums_ptr + head, document_ptr, start, tokens, heads, C)
        k = _load(k_ptr + head // group * D, start, tokens, k_heads * D, inner, C).to(tl.float32)
        dnew = _load(dnews_ptr + head * F, start, tokens, heads * F, column, C).to(tl.float32)
        dnew = (dnew + dot((k * outward[:, None]).to(dtype), dstate.to(dtype), WIDE)).to(dtype)
        _store(dnews_ptr + head * F, dnew, start, owned, heads * F, column, C)
        q = _load(q_ptr + head // group * D, start, tokens, k_heads * D, inner, C).to(tl.float32)
        dout = _load(dout_ptr + head * F, start, tokens, heads * F, column, C)
        keys = _load(keys_ptr + head * D, start, tokens, heads * D, inner, C)
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
        new = _load(news_ptr + head * F, start, tokens, heads * F, column, C)
        dout = _load(dout_ptr + head * F, start, tokens, heads * F, column, C)
        dinside += dot(dout, tl.trans(new), WIDE)
        dreading += dot(dout, tl.trans(state), WIDE)
        dwriting += dot(new, tl.trans(dstate), WIDE)
        kept += tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1)
    q = _load(q_ptr + head // group * D, start, tokens, k_heads * D, inner, C)
    k = _load(k_ptr + head // group * D, start, tokens, k_heads * D, inner, C)
    product, pairs = _inside(q, k, sums_ptr + head, document_ptr, start, tokens, heads, WIDE, C)
    carried, outward, through = _decays(sums_ptr + head, document_ptr, start, tokens, heads, C)
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
    _store(dq_ptr + head * D, dq, start, tokens, heads * D, inner, C)
    _store(dk_ptr + head * D, dk, start, tokens, heads * D, inner, C)
    _store_one(dsums_ptr + head, dsums, start, tokens, heads, C)


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
    beta = _load_one(beta_ptr + head, start, tokens, gate_stride, C)
    dkeys, dsystem = tl.zeros([C, D], tl.float32), tl.zeros([C, C], tl.float32)
    dbeta = tl.zeros([C], tl.float32)
    for f in range(0, F, BF):
        column = f + tl.arange(0, BF)
        dnew = _load(dnews_ptr + head * F, start, tokens, heads * F, column, C)
        dvalues = dot(turned, dnew, WIDE)
        v = _load(v_ptr + head * F, start, tokens, v_stride, column, C).to(tl.float32)
        dbeta += tl.sum(dvalues * v, 1)
        _store(dv_ptr + head * F, dvalues * beta[:, None], start, tokens, heads * F, column, C)
        state = tl.load(states_ptr + chunk * D * F + inner[:, None] * F + column[None, :])
        dkeys -= dot(dnew, tl.trans(state), WIDE)
        values = _load(values_ptr + head * F, start, tokens, heads * F, column, C)
        dsystem -= dot(dvalues.to(dtype), tl.trans(values), WIDE)
    dkeys = dot(turned, dkeys.to(dtype), WIDE)
    keys = _load(keys_ptr + head * D, start, tokens, heads * D, inner, C)
    dsystem = _lower(dsystem - dot(dkeys.to(dtype), tl.trans(keys), WIDE), C)
    k = _load(k_ptr + head // group * D, start, tokens, k_heads * D, inner, C)
    product, pairs = _inside(k, k, sums_ptr + head, document_ptr, start, tokens, heads, WIDE, C)
    carried, _, _ = _decays(sums_ptr + head, document_ptr, start, tokens, heads, C)
    of_keys = tl.sum(dkeys * k.to(tl.float32), 1) * carried
    of_overlap = dsystem * pairs
    dbeta += of_keys + tl.sum(of_overlap * product, 1)
    of_overlap *= beta[:, None]
    along = of_overlap * product
    dsums = _load_one(dsums_ptr + head, start, tokens, heads, C)
    dsums += tl.sum(along, 1) - tl.sum(along, 0) + of_keys * beta
    dk = _load(dk_ptr + head * D, start, tokens, heads * D, inner, C).to(tl.float32)
    both = (of_overlap + tl.trans(of_overlap)).to(dtype)
    dk += dkeys * (beta * carried)[:, None] + dot(both, k, WIDE)
    _store(dk_ptr + head * D, dk, start, tokens, heads * D, inner, C)
    _store_one(dbeta_ptr + head, dbeta, start, tokens, heads, C)
    _store_one(dsums_ptr + head, tl.cumsum(dsums, 0, reverse=True), start, tokens, heads, C)


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
    return {"D": of_k, "F": of_v, "BF": min(of_v, COLUMNS), "WIDE": is_wide(v), "C": CHUNK, "num_warps": 4}


def _per_state(sizes: dict[str, int | bool]) -> dict[str, int | bool]:
    """Sizes of the kernels that go through all chunks."""
    return {**sizes, "BF": min(sizes["F"], STATE_COLUMNS)}


def _make(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, docs: Documents) -> _Made:
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1 and q.stride(1) == k.stride(1) == q.shape[2]
    assert v.stride(1) == v.shape[2] and g.stride() == beta.stride() and g.stride(1) == 1
    (tokens, k_heads, of_k), (_, heads, of_v) = q.shape, v.shape
    document = docs.document_of_token(tokens)
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
        unit_k, keys, values, sums, document, docs.cu_seqlens, states, news,
        tokens, k_heads, heads, group, **per_state,
    )  # fmt: skip
    return _Made(unit_q, unit_k, sums, inverse, values, keys, states, news)


def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, docs: Documents) -> Tensor:
    made = _make(q, k, v, g, beta, docs)
    (tokens, k_heads, _), heads = q.shape, v.shape[1]
    document = docs.document_of_token(tokens)
    out = v.new_empty(v.shape)
    _outputs[(triton.cdiv(tokens, CHUNK), heads)](
        made.q, made.k, made.sums, document, made.states, made.news, out, tokens, k_heads, heads, heads // k_heads,
        **_sizes(q, v),
    )  # fmt: skip
    return out


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, docs: Documents
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert dout.is_contiguous()
    made = _make(q, k, v, g, beta, docs)
    (tokens, k_heads, of_k), (_, heads, of_v) = q.shape, v.shape
    document = docs.document_of_token(tokens)
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
