"""Low-rank products of the backward pass in Triton: dXA = s dY B and dB += s dYᵀ XA in one reading of dY; dA += dXAᵀ X.

Sums that several programs share go through fp32 partial buffers and are added up in a fixed order by a second, small
launch, so results do not depend on timing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.triton.launch import unit_rows
from pronghorn.kernels.triton.lora import dot, is_wide, limits, rank_block, three


@triton.jit
def _grads(
    dy0, dy1, dy2, b0, b1, b2, xa0, xa1, xa2, dxa_partial_ptr, db_partial_ptr, r0, r1, r2, w0, w1, w2,
    dy_stride0, dy_stride1, dy_stride2, blocks0, blocks1, tokens, xa_stride, tokens_each, columns,
    NEED_B: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program takes a block of columns of one dY and a share of the tokens."""
    column_block, share = tl.program_id(0), tl.program_id(1)
    zero = column_block * 0  # makes tensors of numbers that may be constants, so that the branches agree
    dy_ptr, b_ptr, xa_ptr = dy0, b0, xa0
    rank, width, dy_stride = zero + r0, zero + w0, zero + dy_stride0
    first, column_start = zero, zero
    if column_block >= blocks0 + blocks1:
        dy_ptr, b_ptr, xa_ptr = dy2, b2, xa2
        rank, width, dy_stride = zero + r2, zero + w2, zero + dy_stride2
        first, column_start = zero + blocks0 + blocks1, zero + w0 + w1
    elif column_block >= blocks0:
        dy_ptr, b_ptr, xa_ptr = dy1, b1, xa1
        rank, width, dy_stride = zero + r1, zero + w1, zero + dy_stride1
        first, column_start = zero + blocks0, zero + w0
    row, column, r = tl.arange(0, BT), (column_block - first) * BO + tl.arange(0, BO), tl.arange(0, R)
    known_column, known_rank = column < width, r < rank
    b = tl.load(
        b_ptr + column[:, None] * rank + r[None, :],
        mask=known_column[:, None] & known_rank[None, :],
        other=0.0,
    )
    db = tl.zeros([BO, R], dtype=tl.float32)
    begin = share * tokens_each
    at = begin.to(tl.int64)
    # Partial dXA: one slab [tokens, R] for every block of columns.
    slab = dxa_partial_ptr + column_block.to(tl.int64) * tokens * R
    for start in range(begin, tl.minimum(begin + tokens_each, tokens), BT):
        known_row = row < tokens - start
        dy = tl.load(
            dy_ptr + at * dy_stride + row[:, None] * dy_stride + column[None, :],
            mask=known_row[:, None] & known_column[None, :], other=0.0,
        )  # fmt: skip
        tl.store(slab + at * R + row[:, None] * R + r[None, :], dot(dy, b, WIDE), mask=known_row[:, None])
        if NEED_B:
            xa = tl.load(
                xa_ptr + at * xa_stride + row[:, None] * xa_stride + r[None, :],
                mask=known_row[:, None] & known_rank[None, :], other=0.0,
            )  # fmt: skip
            db += dot(tl.trans(dy), xa, WIDE)
        at += BT
    if NEED_B:
        # Partial dB: one slab [columns of all parts, R] for every share of the tokens.
        slab_b = db_partial_ptr + (share.to(tl.int64) * columns + column_start) * R
        tl.store(slab_b + column[:, None] * R + r[None, :], db, mask=known_column[:, None])


@triton.jit
def _sum_of_slabs(at, slab, count, inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """Σ of `count` slabs of a tile in fp32; DEPTH of them are in flight at once."""
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    whole = count // DEPTH * DEPTH
    for _ in range(0, whole, DEPTH):
        for _depth in tl.static_range(DEPTH):
            total += tl.load(at, mask=inside, other=0.0)
            at += slab
    for _ in range(whole, count):
        total += tl.load(at, mask=inside, other=0.0)
        at += slab
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
def _sum_grads(
    dxa_partial_ptr, db_partial_ptr, dxa0, dxa1, dxa2, db0, db1, db2, s0, s1, s2, r0, r1, r2, w0, w1,
    db_stride0, db_stride1, db_stride2, blocks0, blocks1, blocks2, wanted0, wanted1, wanted2,
    tokens, slab, slab_b, dxa_stride, shares, token_blocks, NEED_B: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """All sums of `_grads`: programs of axis 1 are the parts, those of axis 0 rows of dXA and then rows of dB."""
    part, block = tl.program_id(1), tl.program_id(0)
    if block < token_blocks:
        if part == 0:
            _sum_tile(
                dxa_partial_ptr, dxa0, slab, blocks0, tokens, r0, R, dxa_stride, s0, block, 0, False, ROWS, R,
                8,
            )  # fmt: skip
        elif part == 1:
            at = dxa_partial_ptr + part.to(tl.int64) * blocks0 * slab
            _sum_tile(at, dxa1, slab, blocks1, tokens, r1, R, dxa_stride, s1, block, 0, False, ROWS, R, 8)
        else:
            at = dxa_partial_ptr + (part - 1).to(tl.int64) * (blocks0 + blocks1) * slab
            _sum_tile(at, dxa2, slab, blocks2, tokens, r2, R, dxa_stride, s2, block, 0, False, ROWS, R, 8)
    elif NEED_B:
        # Rows wanted of a part: all or none of them.
        block -= token_blocks
        if part == 0:
            _sum_tile(
                db_partial_ptr, db0, slab_b, shares, wanted0, r0, R, db_stride0, s0, block, 0, True, ROWS, R,
                8,
            )  # fmt: skip
        elif part == 1:
            at = db_partial_ptr + w0 * R
            _sum_tile(at, db1, slab_b, shares, wanted1, r1, R, db_stride1, s1, block, 0, True, ROWS, R, 8)
        else:
            at = db_partial_ptr + (w0 + w1) * R
            _sum_tile(at, db2, slab_b, shares, wanted2, r2, R, db_stride2, s2, block, 0, True, ROWS, R, 8)


class Tile(NamedTuple):
    """Tokens and columns that a program of `_grads` holds at once, its warps, and tiles on the way."""

    tokens: int
    columns: int
    warps: int
    stages: int

    def shared(self, rank: int, element: int) -> int:
        """Bytes of shared memory: tiles of dY and XA, B, and something for exchanges between threads.

        Products of 64 and more tokens are asynchronous on Hopper, which keeps one more tile.
        """
        tiles = self.stages - (self.tokens < 64)
        return (tiles * self.tokens * (self.columns + rank) + self.columns * rank) * element + 8 * 1024


def grads_tile(tokens: int, widths: tuple[int, ...], rank: int, element: int, shared: int) -> Tile:
    """The tile for a shape: long rows of columns keep the partial dXA small, as far as shared memory goes."""
    large = tokens * sum(widths) >= 2**25
    columns = {16: 512 if large else 256, 32: 256, 64: 128}.get(rank, 64)
    columns = min(columns, max(triton.next_power_of_2(max(widths)), 64))
    while True:
        tile = Tile(
            64 if tokens > 32 else 16, columns, 8 if columns == 512 else 4, 2 if columns == 256 else 3
        )
        if tile.shared(rank, element) <= shared or columns == 64:
            return tile
        columns //= 2


@cache
def grads_config(
    tokens: int, widths: tuple[int, ...], rank: int, element: int, sms: int, shared: int
) -> dict[str, int]:
    """Tiles and the number of shares of tokens ("SHARES") for `output_grads`.

    A block of BO columns writes a partial dXA of 2·R/BO of its bytes and a share of tokens a partial dB of
    2·R/tokens of them, so both are made long; the number of shares that costs least by this count and by whole waves
    of programs is taken.
    """
    tile = grads_tile(tokens, widths, rank, element, shared)
    resident = max(min(shared // tile.shared(rank, element), 4), 1)
    blocks = sum(triton.cdiv(width, tile.columns) for width in widths)
    best, best_cost = (1, tokens), float("inf")
    for shares in range(1, min(triton.cdiv(tokens, tile.tokens), 128) + 1):
        each = triton.cdiv(triton.cdiv(tokens, shares), tile.tokens) * tile.tokens
        count = triton.cdiv(tokens, each)
        waves = triton.cdiv(blocks * count, sms * resident)
        cost = waves * sms * resident * each * tile.columns * element + count * sum(widths) * rank * 8
        if cost < best_cost:
            best, best_cost = (count, each), cost
    return {
        "SHARES": best[0],
        "TOKENS_EACH": best[1],
        "BT": tile.tokens,
        "BO": tile.columns,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def output_grads(
    dys: Sequence[Tensor],
    bs: Sequence[Tensor],
    scalings: Sequence[float],
    xa: Tensor | None,
    b_grads: Sequence[Tensor | None],
    a: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dXA, and dXA A where `a` is given."""
    dys, bs = [unit_rows(dy) for dy in dys], [b.contiguous() for b in bs]
    ranks, widths = [b.shape[1] for b in bs], [b.shape[0] for b in bs]
    tokens, device = dys[0].shape[0], dys[0].device
    dxa = torch.empty(tokens, sum(ranks), dtype=dys[0].dtype, device=device)
    start = None if a is None else torch.empty(tokens, a.shape[1], dtype=dxa.dtype, device=device)
    if not tokens:
        return dxa, start
    need_b = xa is not None and any(grad is not None for grad in b_grads)
    xa = unit_rows(xa) if xa is not None and need_b else dxa
    padded, columns = rank_block(ranks), sum(widths)
    config = dict(grads_config(tokens, tuple(widths), padded, dxa.element_size(), *limits(device)))
    shares, each = config.pop("SHARES"), config.pop("TOKENS_EACH")
    blocks = [triton.cdiv(width, config["BO"]) for width in widths]
    dxa_partial = torch.empty(sum(blocks), tokens, padded, dtype=torch.float32, device=device)
    db_partial = torch.empty(shares if need_b else 0, columns, padded, dtype=torch.float32, device=device)
    _grads[(sum(blocks), shares)](
        *three(dys), *three(bs), *three(list(xa.split(ranks, 1))), dxa_partial, db_partial, *three(ranks),
        *three(widths), *three([dy.stride(0) for dy in dys]), *three(blocks)[:2],
        tokens, xa.stride(0), each, columns, NEED_B=need_b, R=padded, WIDE=is_wide(dxa), **config,
    )  # fmt: skip
    partials = Partials(dxa_partial, db_partial, tuple(ranks), tuple(widths), tuple(blocks))
    sum_output_grads(partials, dxa, b_grads if need_b else (), scalings, a, start)
    return dxa, start


class Partials(NamedTuple):
    """What `_grads` leaves to be summed: dXA [Σ blocks, T, R] and dB [shares, Σ widths, R], parts in order."""

    dxa: Tensor
    db: Tensor
    ranks: tuple[int, ...]
    widths: tuple[int, ...]
    blocks: tuple[int, ...]


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


@triton.jit
def _sum_grads_start(
    dxa_partial_ptr, db_partial_ptr, dxa0, dxa1, dxa2, db0, db1, db2, a_ptr, start_ptr, s0, s1, s2, r0, r1, r2, w0, w1,
    db_stride0, db_stride1, db_stride2, blocks0, blocks1, blocks2, wanted0, wanted1, wanted2,
    tokens, slab, slab_b, dxa_stride, shares, a_stride, width, columns_each, pieces, token_programs, row_blocks,
    PARTS: tl.constexpr, NEED_B: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr,
    BO: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr,
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
        # Rows wanted of a part: all or none of them.
        program -= token_programs
        part, block = program // row_blocks, program % row_blocks
        if part == 0:
            _sum_tile(
                db_partial_ptr, db0, slab_b, shares, wanted0, r0, R, db_stride0, s0, block, 0, True, ROWS, R,
                8,
            )  # fmt: skip
        elif part == 1:
            at = db_partial_ptr + w0 * R
            _sum_tile(at, db1, slab_b, shares, wanted1, r1, R, db_stride1, s1, block, 0, True, ROWS, R, 8)
        else:
            at = db_partial_ptr + (w0 + w1) * R
            _sum_tile(at, db2, slab_b, shares, wanted2, r2, R, db_stride2, s2, block, 0, True, ROWS, R, 8)


def start_config(tokens: int, width: int, sms: int) -> dict[str, int]:
    """Some programs a processor; each sums dXA of its tokens anew and takes a piece of the columns ("PIECES")."""
    block = 64 if tokens >= 64 * sms else 32 if tokens > 16 else 16
    pieces = max(1, min(3 * sms // triton.cdiv(tokens, block), triton.cdiv(width, 128)))
    return {"PIECES": pieces, "BT": block, "BO": 128, "DEPTH": 8, "num_warps": 4}


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
    rows = 1024 // padded
    row_blocks = triton.cdiv(max(wanted), rows)
    pointers = [partials.dxa, partials.db, *three(list(dxa.split(ranks, 1))), *three(grads)]
    numbers = [
        *three([float(s) for s in scalings]), *three(ranks), *three(widths)[:2],
        *three([grad.stride(0) for grad in grads]), *three(list(partials.blocks)), *three(wanted),
        tokens, tokens * padded, sum(widths) * padded, dxa.stride(0), shares,
    ]  # fmt: skip
    if a is None or start is None:
        token_blocks = triton.cdiv(tokens, rows)
        _sum_grads[(token_blocks + row_blocks, len(ranks))](
            *pointers, *numbers, token_blocks, NEED_B=max(wanted) > 0, R=padded, ROWS=rows, num_warps=4
        )
        return
    a, width = unit_rows(a), start.shape[1]
    config = dict(start_config(tokens, width, limits(dxa.device)[0]))
    each = triton.cdiv(triton.cdiv(width, config.pop("PIECES")), config["BO"]) * config["BO"]
    pieces = triton.cdiv(width, each)
    programs = triton.cdiv(tokens, config["BT"]) * pieces
    _sum_grads_start[(programs + row_blocks * len(ranks),)](
        *pointers, a, start, *numbers, a.stride(0), width, each, pieces, programs, row_blocks,
        PARTS=len(ranks), NEED_B=max(wanted) > 0, R=padded, ROWS=rows, WIDE=is_wide(dxa), **config,
    )  # fmt: skip


@triton.jit
def _a_grads(
    dxa_ptr, x_ptr, partial_ptr, tokens, width, rank, dxa_stride, x_stride, tokens_each,
    R: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    block, share = tl.program_id(0), tl.program_id(1)
    row, column, r = tl.arange(0, BT), block * BO + tl.arange(0, BO), tl.arange(0, R)
    known_column, known_rank = column < width, r < rank
    total = tl.zeros([R, BO], dtype=tl.float32)
    begin = share * tokens_each
    at = begin.to(tl.int64)
    for start in range(begin, tl.minimum(begin + tokens_each, tokens), BT):
        known_row = row < tokens - start
        x = tl.load(
            x_ptr + at * x_stride + row[:, None] * x_stride + column[None, :],
            mask=known_row[:, None] & known_column[None, :], other=0.0,
        )  # fmt: skip
        dxa = tl.load(
            dxa_ptr + at * dxa_stride + row[:, None] * dxa_stride + r[None, :],
            mask=known_row[:, None] & known_rank[None, :], other=0.0,
        )  # fmt: skip
        total += dot(tl.trans(dxa), x, WIDE)
        at += BT
    to = partial_ptr + (share.to(tl.int64) * rank + r[:, None]) * width + column[None, :]
    tl.store(to, total, mask=known_rank[:, None] & known_column[None, :])


@triton.jit
def _sum_a_grads(
    partial_ptr, grad_ptr, slab, count, rank, width, grad_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    _sum_tile(
        partial_ptr, grad_ptr, slab, count, rank, width, width, grad_stride, 1.0,
        tl.program_id(1), tl.program_id(0), True, ROWS, COLUMNS, 8,
    )  # fmt: skip


@cache
def a_grads_config(tokens: int, width: int, rank: int, element: int, sms: int, shared: int) -> dict[str, int]:
    """Two programs a processor; a share of tokens costs 2·R/tokens of the bytes of x, written and read again."""
    columns = 256 if rank <= 32 else 128
    while columns > 32 and 3 * 64 * (columns + rank) * element > shared - 16 * 1024:
        columns //= 2
    blocks = triton.cdiv(width, columns)
    shares = max(1, min(triton.cdiv(2 * sms, blocks), triton.cdiv(tokens, 128)))
    each = triton.cdiv(triton.cdiv(tokens, shares), 64) * 64
    return {"TOKENS_EACH": each, "BT": 64, "BO": columns, "num_warps": 4, "num_stages": 3}


def accumulate_a(a_grad: Tensor, dxa: Tensor, x: Tensor) -> Tensor:
    if a_grad.stride(1) != 1:
        raise ValueError("the gradient of A needs rows of unit stride")
    dxa, x = unit_rows(dxa), unit_rows(x)
    (tokens, width), rank = x.shape, dxa.shape[1]
    if not tokens:
        return a_grad
    padded = rank_block([rank])
    config = dict(a_grads_config(tokens, width, padded, x.element_size(), *limits(x.device)))
    each = config.pop("TOKENS_EACH")
    shares = triton.cdiv(tokens, each)
    partial = torch.empty(shares, rank, width, dtype=torch.float32, device=x.device)
    _a_grads[(triton.cdiv(width, config["BO"]), shares)](
        dxa, x, partial, tokens, width, rank, dxa.stride(0), x.stride(0), each, R=padded, WIDE=is_wide(x),
        **config,
    )  # fmt: skip
    sum_a_grads(partial, a_grad)
    return a_grad


def sum_a_grads(partial: Tensor, a_grad: Tensor) -> None:
    """a_grad [ΣR, in] += Σ of partial [shares, ΣR, in]."""
    shares, rank, width = partial.shape
    _sum_a_grads[(triton.cdiv(width, 256), triton.cdiv(rank, 4))](
        partial, a_grad, rank * width, shares, rank, width, a_grad.stride(0), ROWS=4, COLUMNS=256, num_warps=4
    )


@triton.jit
def _sum_rows(partial_ptr, out_ptr, slab, count, rows, columns, R: tl.constexpr, ROWS: tl.constexpr):
    _sum_tile(
        partial_ptr, out_ptr, slab, count, rows, columns, R, columns, 1.0, tl.program_id(0), 0, False, ROWS, R,
        8,
    )  # fmt: skip


def sum_rows(partial: Tensor, out: Tensor) -> None:
    """out [T, R], contiguous, from its partial sums [pieces, T, R or more]."""
    pieces, tokens, padded = partial.shape
    rows = 1024 // padded
    _sum_rows[(triton.cdiv(tokens, rows),)](
        partial, out, tokens * padded, pieces, tokens, out.shape[1], R=padded, ROWS=rows, num_warps=4
    )
