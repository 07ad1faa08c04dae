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

from pronghorn.kernels import tiles
from pronghorn.kernels.triton.launch import unit_rows
from pronghorn.kernels.triton.lora import dot, is_wide, limits, rank_block, three
from pronghorn.kernels.triton.lora_sums import Partials, sum_a_grads, sum_output_grads
from pronghorn.kernels.triton.lora_sums import sum_rows as sum_rows


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
        # With 256 columns the products take no longer than the loads only on two groups of four warps.
        warps, stages = {512: (8, 3), 256: (8, 4)}.get(columns, (4, 3))
        tile = Tile(64 if tokens > 32 else 16, columns, warps, stages)
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
    ranks, tokens, device = [b.shape[1] for b in bs], dys[0].shape[0], dys[0].device
    dxa = torch.empty(tokens, sum(ranks), dtype=dys[0].dtype, device=device)
    start = None if a is None else torch.empty(tokens, a.shape[1], dtype=dxa.dtype, device=device)
    if not tokens:
        return dxa, start
    need_b = xa is not None and any(grad is not None for grad in b_grads)
    xa = unit_rows(xa) if xa is not None and need_b else dxa
    made = _by_copy_engine if _suits_copy_engine(dys, bs, xa) else _by_loads
    partials = made(dys, bs, list(xa.split(ranks, 1)), need_b)
    sum_output_grads(partials, dxa, b_grads if need_b else (), scalings, a, start)
    return dxa, start


def _suits_copy_engine(dys: Sequence[Tensor], bs: Sequence[Tensor], xa: Tensor) -> bool:
    """Whether `lora_hopper` takes these: 16 bits, ranks of multiples of 8 up to 32, many tiles."""
    if not tiles.on_hopper(dys[0], None):
        return False
    from pronghorn.kernels.triton.lora_hopper import suits

    return suits(dys, bs, xa)


def _by_copy_engine(
    dys: Sequence[Tensor], bs: Sequence[Tensor], xas: Sequence[Tensor], need_b: bool
) -> Partials:
    from pronghorn.kernels.triton import lora_hopper

    return lora_hopper.output_grads(dys, bs, xas, need_b)


def _by_loads(dys: Sequence[Tensor], bs: Sequence[Tensor], xas: Sequence[Tensor], need_b: bool) -> Partials:
    ranks, widths = [b.shape[1] for b in bs], [b.shape[0] for b in bs]
    tokens, device = dys[0].shape[0], dys[0].device
    padded, columns = rank_block(ranks), sum(widths)
    config = dict(grads_config(tokens, tuple(widths), padded, dys[0].element_size(), *limits(device)))
    shares, each = config.pop("SHARES"), config.pop("TOKENS_EACH")
    blocks = [triton.cdiv(width, config["BO"]) for width in widths]
    dxa_partial = torch.empty(sum(blocks), tokens, padded, dtype=torch.float32, device=device)
    db_partial = torch.empty(shares if need_b else 0, columns, padded, dtype=torch.float32, device=device)
    _grads[(sum(blocks), shares)](
        *three(list(dys)), *three(list(bs)), *three(list(xas)), dxa_partial, db_partial, *three(ranks),
        *three(widths), *three([dy.stride(0) for dy in dys]), *three(blocks)[:2],
        tokens, xas[0].stride(0), each, columns, NEED_B=need_b, R=padded, WIDE=is_wide(dys[0]), **config,
    )  # fmt: skip
    return Partials(dxa_partial, db_partial, tuple(ranks), tuple(widths), tuple(blocks))


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
