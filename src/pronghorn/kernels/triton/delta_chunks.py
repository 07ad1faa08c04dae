"""Parts of a chunk of the gated delta rule in Triton: see `kernels.delta_rule`, whose letters are used here."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(ptr, start, tokens, stride, column, C: tl.constexpr):
    """Rows of a chunk, zero beyond the stream."""
    row = start + tl.arange(0, C)
    at = ptr + row[:, None].to(tl.int64) * stride + column[None, :]
    return tl.load(at, mask=(row < tokens)[:, None], other=0.0)


@triton.jit
def store(ptr, value, start, tokens, stride, column, C: tl.constexpr):
    row = start + tl.arange(0, C)
    at = ptr + row[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=(row < tokens)[:, None])


@triton.jit
def load_one(ptr, start, tokens, stride, C: tl.constexpr):
    """A number of each token of a chunk, in fp32."""
    row = start + tl.arange(0, C)
    return tl.load(ptr + row.to(tl.int64) * stride, mask=row < tokens, other=0.0).to(tl.float32)


@triton.jit
def store_one(ptr, value, start, tokens, stride, C: tl.constexpr):
    row = start + tl.arange(0, C)
    tl.store(ptr + row.to(tl.int64) * stride, value, mask=row < tokens)


@triton.jit
def documents(document_ptr, start, tokens, C: tl.constexpr):
    """Documents of a chunk's tokens, of the token before it, and of its last one; none of these is alike where there is
    no token."""
    row = start + tl.arange(0, C)
    document = tl.load(document_ptr + row, mask=row < tokens, other=-1)
    before = tl.load(document_ptr + start - 1, mask=start > 0, other=-2)
    last = tl.load(document_ptr + start + C - 1, mask=start + C - 1 < tokens, other=-3)
    return document, before, last


@triton.jit
def bounds(bounds_ptr):
    """Where the program's document begins and ends; an empty one has no chunks."""
    begin = tl.load(bounds_ptr + tl.program_id(0))
    end = tl.load(bounds_ptr + tl.program_id(0) + 1)
    return begin, tl.where(end > begin, end, 0)


@triton.jit
def decays(sums_ptr, document_ptr, start, tokens, heads, C: tl.constexpr):
    """γ, e and γ_C."""
    sums = load_one(sums_ptr, start, tokens, heads, C)
    document, before, last = documents(document_ptr, start, tokens, C)
    end = tl.load(sums_ptr + (start + C - 1) * heads, mask=start + C - 1 < tokens, other=0.0)
    carried = tl.where(document == before, tl.exp(sums), 0.0)
    outward = tl.where(document == last, tl.exp(tl.minimum(end - sums, 0.0)), 0.0)
    return carried, outward, tl.where(last == before, tl.exp(end), 0.0)


@triton.jit
def pairs_of(sums, document, C: tl.constexpr):
    """Γ [C, C]."""
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    known = (document[:, None] == document[None, :]) & (row >= column)
    return tl.where(known, tl.exp(tl.minimum(sums[:, None] - sums[None, :], 0.0)), 0.0)


@triton.jit
def lower(x, C: tl.constexpr):
    """x strictly below the diagonal."""
    return tl.where(tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :], x, 0.0)


@triton.jit
def inverse_of(system, WIDE: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr):
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
