"""Sums of partial results of the low-rank products, in a fixed order; with dXA summed, dXA A on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.tiles import Sums
from pronghorn.kernels.triton.launch import unit_rows
from pronghorn.kernels.triton.lora import dot, is_wide, limits, three


@triton.jit
def _sum_of_slabs(at, slab, count, inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """Σ of `count` slabs of a tile in fp32, DEPTH of them in a round, the last of which may have fewer. One load of all
    of a round took up to twice as long (8B, q, k and v with dXA A: 151 against 76 µs)."""
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    left = tl.zeros([ROWS, 1], dtype=tl.int32) + count
    for _ in range(0, count, DEPTH):
        for depth in tl.static_range(DEPTH):
            total += tl.load(at, mask=inside & (left > depth), other=0.0)
            at += slab
        left -= DEPTH
    return total


@triton.jit
def _sum_tile(
    partial_ptr, out_ptr, slab, count, rows, columns, partial_stride, out_stride, scaling, row_block, column_block,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] (+)= scaling · Σ of `count` slabs."""
    row = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    at = partial_ptr + row[:, None] * partial_stride + column[None, :]
    total = _sum_of_slabs(at, slab, count, inside, ROWS, COLUMNS, DEPTH) * scaling
    to = out_ptr + row[:, None] * out_stride + column[None, :]
    if ADD:
        total += tl.load(to, mask=inside, other=0.0).to(tl.float32)
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def pieces_of(block, tiles, each):
    """Programs that share a block of columns, where each takes so many tiles in a row and a block has `tiles`."""
    each = tl.maximum(each, 1)
    return ((block + 1) * tiles - 1) // each - block * tiles // each + 1


#: Sizes that say nothing about alignment (ranks do: of the loads' masks). Compiling for each of their kinds (1, a
#: multiple of 16, another) takes a second each time.
_PLAIN = (
    "w0", "w1", "blocks0", "blocks1", "blocks2", "wanted0", "wanted1", "wanted2", "shares", "tiles", "each",
    "block_columns",
)  # fmt: skip
_PLAIN_START = (*_PLAIN, "token_programs", "row_blocks")


@triton.jit
def _of(part, first, second, third):
    """The part's own of three numbers or pointers. One body for all parts is compiled once instead of three times."""
    return tl.where(part == 0, first, tl.where(part == 1, second, third))


@triton.jit
def _sum_db(
    partial_ptr, db0, db1, db2, s0, s1, s2, r0, r1, r2, w0, w1, stride0, stride1, stride2, wanted0, wanted1, wanted2,
    blocks0, blocks1, slab, shares, tiles, each, block_columns, part, block, R: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """A block of a part's dB += its sum; all rows of a part are wanted or none."""
    of_grads = _of(part, blocks0 * 0, blocks0, blocks0 + blocks1) + block * ROWS // block_columns
    shares = tl.where(each > 0, pieces_of(of_grads, tiles, each), shares)
    begin = _of(part, w0 * 0, w0, w0 + w1).to(tl.int64) * R
    _sum_tile(
        partial_ptr + begin, _of(part, db0, db1, db2), slab, shares, _of(part, wanted0, wanted1, wanted2),
        _of(part, r0, r1, r2), R, _of(part, stride0, stride1, stride2), _of(part, s0, s1, s2), block, 0, True, ROWS, R,
        DEPTH,
    )  # fmt: skip


@triton.jit(do_not_specialize=(*_PLAIN, "token_blocks"))
def _sum_grads(
    dxa_partial_ptr, db_partial_ptr, dxa0, dxa1, dxa2, db0, db1, db2, s0, s1, s2, r0, r1, r2, w0, w1,
    db_stride0, db_stride1, db_stride2, blocks0, blocks1, blocks2, wanted0, wanted1, wanted2,
    tokens, slab, slab_b, dxa_stride, shares, tiles, each, block_columns, token_blocks, NEED_B: tl.constexpr,
    R: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """All sums of `_grads`: programs of axis 1 are the parts, those of axis 0 rows of dXA and then rows of dB."""
    part, block = tl.program_id(1), tl.program_id(0)
    if block < token_blocks:
        begin = _of(part, blocks0 * 0, blocks0, blocks0 + blocks1).to(tl.int64) * slab
        _sum_tile(
            dxa_partial_ptr + begin, _of(part, dxa0, dxa1, dxa2), slab, _of(part, blocks0, blocks1, blocks2), tokens,
            _of(part, r0, r1, r2), R, dxa_stride, _of(part, s0, s1, s2), block, 0, False, ROWS, R, DEPTH,
        )  # fmt: skip
    elif NEED_B:
        _sum_db(
            db_partial_ptr, db0, db1, db2, s0, s1, s2, r0, r1, r2, w0, w1, db_stride0, db_stride1, db_stride2,
            wanted0, wanted1, wanted2, blocks0, blocks1, slab_b, shares, tiles, each, block_columns, part,
            block - token_blocks, R, ROWS, DEPTH,
        )  # fmt: skip


@triton.jit
def _finished_dxa(
    partial_ptr, dxa_ptr, slab, count, tokens, rank, dxa_stride, scaling, start, stored,
    R: tl.constexpr, BT: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A part's dXA of BT tokens, rounded; `stored` rows of it are written: all by one of the programs that need it."""
    row, r = tl.arange(0, BT), tl.arange(0, R)
    known_row = row[:, None] < tokens - start
    at = partial_ptr + start * R + row[:, None] * R + r[None, :]
    total = _sum_of_slabs(at, slab, count, known_row & (r[None, :] < R), BT, R, DEPTH) * scaling
    dxa = total.to(dxa_ptr.dtype.element_ty)
    to = dxa_ptr + start * dxa_stride + row[:, None] * dxa_stride + r[None, :]
    tl.store(to, dxa, mask=(row[:, None] < stored) & (r[None, :] < rank))
    return dxa


@triton.jit
def _times_a(dxa, a_ptr, a_stride, rank, column, known_column, R: tl.constexpr, WIDE: tl.constexpr):
    r = tl.arange(0, R)
    a = tl.load(
        a_ptr + r[:, None] * a_stride + column[None, :],
        mask=(r < rank)[:, None] & known_column[None, :],
        other=0.0,
    )
    return dot(dxa, a, WIDE)


@triton.jit(do_not_specialize=_PLAIN_START)
def _sum_grads_start(
    dxa_partial_ptr, db_partial_ptr, dxa0, dxa1, dxa2, db0, db1, db2, a_ptr, start_ptr, s0, s1, s2, r0, r1, r2, w0, w1,
    db_stride0, db_stride1, db_stride2, blocks0, blocks1, blocks2, wanted0, wanted1, wanted2,
    tokens, slab, slab_b, dxa_stride, shares, tiles, each, block_columns, a_stride, width, columns_each, pieces,
    token_programs, row_blocks, PARTS: tl.constexpr, NEED_B: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
    BT: tl.constexpr, BO: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All sums of `_grads`, and dXA A [T, in] in the same launch: programs of tokens and columns, then rows of dB."""
    program = tl.program_id(0)
    if program < token_programs:
        piece = program % pieces
        start = (program // pieces).to(tl.int64) * BT
        stored = tl.where(piece == 0, tokens - start, 0)
        slab_first, slab_second = start * 0 + blocks0, start * 0 + blocks0 + blocks1
        first = _finished_dxa(
            dxa_partial_ptr, dxa0, slab, blocks0, tokens, r0, dxa_stride, s0, start, stored, R, BT, DEPTH
        )
        second, third = first, first
        if PARTS > 1:
            at = dxa_partial_ptr + slab_first * slab
            second = _finished_dxa(
                at, dxa1, slab, blocks1, tokens, r1, dxa_stride, s1, start, stored, R, BT, DEPTH
            )
        if PARTS > 2:
            at = dxa_partial_ptr + slab_second * slab
            third = _finished_dxa(
                at, dxa2, slab, blocks2, tokens, r2, dxa_stride, s2, start, stored, R, BT, DEPTH
            )
        row = tl.arange(0, BT)
        known_row = row < tokens - start
        begin = piece * columns_each
        for at_column in range(begin, tl.minimum(begin + columns_each, width), BO):
            column = at_column + tl.arange(0, BO)
            known_column = column < width
            y = _times_a(first, a_ptr, a_stride, r0, column, known_column, R, WIDE)
            if PARTS > 1:
                y += _times_a(second, a_ptr + r0 * a_stride, a_stride, r1, column, known_column, R, WIDE)
            if PARTS > 2:
                y += _times_a(
                    third, a_ptr + (r0 + r1) * a_stride, a_stride, r2, column, known_column, R, WIDE
                )
            to = start_ptr + start * width + row[:, None] * width + column[None, :]
            tl.store(to, y.to(start_ptr.dtype.element_ty), mask=known_row[:, None] & known_column[None, :])
    elif NEED_B:
        program -= token_programs
        _sum_db(
            db_partial_ptr, db0, db1, db2, s0, s1, s2, r0, r1, r2, w0, w1, db_stride0, db_stride1, db_stride2,
            wanted0, wanted1, wanted2, blocks0, blocks1, slab_b, shares, tiles, each, block_columns,
            program // row_blocks, program % row_blocks, R, ROWS, DEPTH,
        )  # fmt: skip


def start_config(tokens: int, width: int, padded: int, sms: int) -> dict[str, int]:
    """Some programs a processor; each sums dXA of its tokens anew and takes a piece of the columns ("PIECES").

    8B, 8,192 tokens, µs: gate and up 45 with one piece, 128 columns at a time, 33 with two and 256 (q, k, v 40 and 32,
    o 25 and 24); at rank 32 256 at a time take 91 where 128 take 76.
    """
    block = 32 if tokens > 16 else 16
    most = 3 * sms // triton.cdiv(tokens, block)
    pieces = max(1, min(max(most, 2), triton.cdiv(width, 128)))
    columns = 256 if most <= 2 and padded <= 16 else 128
    return {"PIECES": pieces, "BT": block, "BO": columns, "DEPTH": 14, "num_warps": 4}


def sum_config(padded: int) -> dict[str, int]:
    """Four numbers a thread."""
    return {"ROWS": max(512 // padded, 1), "DEPTH": 8, "num_warps": 4}


class Partials(NamedTuple):
    """What is left to be summed: dXA [Σ blocks, T, R] and dB [shares, Σ widths, R], parts in order.

    Where programs took `each` tiles in a row of the `tiles` of a block of `block_columns`, blocks have as many partial
    sums of dB as programs had a part in them (`pieces_of`); else all have `shares`.
    """

    dxa: Tensor
    db: Tensor
    ranks: tuple[int, ...]
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    tiles: int = 0
    each: int = 0
    block_columns: int = 1 << 30


def sum_output_grads(
    partials: Partials,
    dxa: Tensor,
    b_grads: Sequence[Tensor | None],
    scalings: Sequence[float],
    a: Tensor | None = None,
    start: Tensor | None = None,
) -> None:
    """dxa [T, ΣR], b_grads += theirs, and start [T, in] = dxa a where given."""
    ranks, widths = list(partials.ranks), list(partials.widths)
    tokens, padded, shares = dxa.shape[0], partials.dxa.shape[2], partials.db.shape[0]
    given = list(b_grads) or [None] * len(ranks)
    grads = [partials.dxa if grad is None else unit_rows(grad) for grad in given]
    wanted = [0 if grad is None else width for grad, width in zip(given, widths, strict=True)]
    sums = sum_config(padded)
    rows = sums["ROWS"]
    row_blocks = triton.cdiv(max(wanted), rows)
    pointers = [partials.dxa, partials.db, *three(list(dxa.split(ranks, 1))), *three(grads)]
    numbers = [
        *three([float(s) for s in scalings]), *three(ranks), *three(widths)[:2],
        *three([grad.stride(0) for grad in grads]), *three(list(partials.blocks)), *three(wanted),
        tokens, tokens * padded, sum(widths) * padded, dxa.stride(0), shares, partials.tiles, partials.each,
        partials.block_columns,
    ]  # fmt: skip
    if a is None or start is None:
        token_blocks = triton.cdiv(tokens, rows)
        _sum_grads[(token_blocks + row_blocks, len(ranks))](
            *pointers, *numbers, token_blocks, NEED_B=max(wanted) > 0, R=padded, **sums
        )
        return
    a, width = unit_rows(a), start.shape[1]
    config = {**sums, **start_config(tokens, width, padded, limits(dxa.device)[0])}
    each = triton.cdiv(triton.cdiv(width, config.pop("PIECES")), config["BO"]) * config["BO"]
    pieces = triton.cdiv(width, each)
    programs = triton.cdiv(tokens, config["BT"]) * pieces
    _sum_grads_start[(programs + row_blocks * len(ranks),)](
        *pointers, a, start, *numbers, a.stride(0), width, each, pieces, programs, row_blocks,
        PARTS=len(ranks), NEED_B=max(wanted) > 0, R=padded, WIDE=is_wide(dxa), **config,
    )  # fmt: skip


#: From so many slabs on, sums are dealt to more and smaller programs: one that goes through all of them has as many
#: loads on the way as it can have, whatever its size. (112 slabs of 8,192 rows, 128 programs: 64 µs for 59 MB.)
MANY = 64


@triton.jit(do_not_specialize=["first", "rest", "until"])
def _sum_a_grads(
    partial_ptr, grad_ptr, slab, rank, width, grad_stride, first, rest, until, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    count = tl.where(tl.program_id(0) * COLUMNS < until, first, rest)
    _sum_tile(
        partial_ptr, grad_ptr, slab, count, rank, width, width, grad_stride, 1.0,
        tl.program_id(1), tl.program_id(0), True, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip


def sum_a_grads(partial: Tensor, a_grad: Tensor, sums: Sums | None = None) -> None:
    """a_grad [ΣR, in] += Σ of partial [shares, ΣR, in]; `sums` change at a multiple of 256 columns."""
    shares, rank, width = partial.shape
    sums = sums or Sums(0, shares, 0)
    rows, columns, depth = (2, 256, 16) if shares > 8 else (4, 256, 8)
    _sum_a_grads[(triton.cdiv(width, columns), triton.cdiv(rank, rows))](
        partial, a_grad, rank * width, rank, width, a_grad.stride(0), *sums,
        ROWS=rows, COLUMNS=columns, DEPTH=depth, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first", "rest", "until"])
def _sum_rows(
    partial_ptr, out_ptr, slab, rows, columns, first, rest, until, R: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    count = tl.where(tl.program_id(0) * ROWS < until, first, rest)
    _sum_tile(
        partial_ptr, out_ptr, slab, count, rows, columns, R, columns, 1.0, tl.program_id(0), 0, False, ROWS, R,
        DEPTH,
    )  # fmt: skip


def sum_rows(partial: Tensor, out: Tensor, sums: Sums | None = None) -> None:
    """out [T, R], contiguous, from its partial sums [pieces, T, R or more]; `sums` change at a multiple of 64 rows."""
    pieces, tokens, padded = partial.shape
    sums = sums or Sums(0, pieces, 0)
    many = pieces >= MANY
    rows = max((256 if many else 1024) // padded, 1)
    _sum_rows[(triton.cdiv(tokens, rows),)](
        partial, out, tokens * padded, tokens, out.shape[1], *sums,
        R=padded, ROWS=rows, DEPTH=16 if many else 8, num_warps=2 if many else 4,
    )  # fmt: skip
