"""Gradients behind adapters on Hopper in one reading of dY, written in Gluon (Triton's language of explicit layouts and
warps).

    dXA = dY B,   dB = dYᵀ XA        of up to three parts

One warp has the copy engine bring tiles of dY and XA into a ring of stages; a group of warps multiplies each tile
twice. Tiles are dealt out by count, in one row: a block of columns, token after token, then the next block. So no
program waits for a last round, and few partial sums of dB are left: one where a program begins or ends inside a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from pronghorn.kernels.tiles import aligned
from pronghorn.kernels.triton.gluon_parts import fetch, next_stage, ring, tiles_of
from pronghorn.kernels.triton.launch import processors
from pronghorn.kernels.triton.lora import rank_block, three
from pronghorn.kernels.triton.lora_sums import Partials

#: tokens of a tile
TOKENS = gl.constexpr(64)
#: rank -> columns of a tile and stages in shared memory
TILES = {16: (512, 3), 32: (256, 5)}
#: tiles a processor from which on the kernel is taken
LEAST_TILES = 4


class Shares(NamedTuple):
    """How tiles are dealt out: `tiles` of tokens make a block of columns, a program takes `each` of them in a row."""

    tiles: int
    each: int
    programs: int

    def pieces(self, blocks: int) -> int:
        """Most programs that a block is shared by."""
        ends = ((block + 1) * self.tiles - 1 for block in range(blocks))
        return max(end // self.each - (end - self.tiles + 1) // self.each + 1 for end in ends)


def shares_of(tokens: int, blocks: int, most: int) -> Shares:
    """`most`: of the programs that run at once."""
    tiles = triton.cdiv(tokens, TOKENS.value)
    each = triton.cdiv(tiles * blocks, most)
    return Shares(tiles, each, triton.cdiv(tiles * blocks, each))


@gluon.jit
def _copy(
    given, dys, xas, b_tile, full, empty, b_full, b_empty, blocks0, blocks1, tiles, begin, end, STAGES: gl.constexpr,
):  # fmt: skip
    (dy0, dy1, dy2, b0, b1, b2, xa0, xa1, xa2) = given
    COLUMNS: gl.constexpr = b_tile.shape[0]
    R: gl.constexpr = b_tile.shape[1]
    stage = 0
    phase = 1
    b_phase = 1
    for block in range(begin // tiles, (end + tiles - 1) // tiles):
        part = gl.where(block >= blocks0 + blocks1, 2, gl.where(block >= blocks0, 1, 0))
        column = (block - gl.where(part == 2, blocks0 + blocks1, gl.where(part == 1, blocks0, 0))) * COLUMNS
        mbarrier.wait(b_empty, b_phase)
        b_phase = b_phase ^ 1
        mbarrier.expect(b_full, COLUMNS * R * 2)
        for half in gl.static_range(COLUMNS // 256):
            at = column + half * 256
            to = b_tile.slice(half * 256, 256)
            fetch(b0, [at, 0], b_full, to, pred=part == 0)
            fetch(b1, [at, 0], b_full, to, pred=part == 1)
            fetch(b2, [at, 0], b_full, to, pred=part == 2)
        first = gl.maximum(begin, block * tiles)
        for unit in range(first, gl.minimum(end, (block + 1) * tiles)):
            token = (unit - block * tiles) * TOKENS
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, TOKENS * (COLUMNS + R) * 2)
            if part == 0:
                fetch(dy0, [token, column], bar, dys.index(stage))
                fetch(xa0, [token, 0], bar, xas.index(stage))
            elif part == 1:
                fetch(dy1, [token, column], bar, dys.index(stage))
                fetch(xa1, [token, 0], bar, xas.index(stage))
            else:
                fetch(dy2, [token, column], bar, dys.index(stage))
                fetch(xa2, [token, 0], bar, xas.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _group(
    dys, xas, b_tile, full, empty, b_full, b_empty, dxa_ptr, db_ptr, blocks0, blocks1, w0, w1, w2, columns_of_all,
    tokens, tiles, each, begin, end, STAGES: gl.constexpr, NEED_B: gl.constexpr,
):  # fmt: skip
    COLUMNS: gl.constexpr = b_tile.shape[0]
    R: gl.constexpr = b_tile.shape[1]
    of_dxa: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R, 16])
    stage = 0
    phase = 0
    b_phase = 0
    row = gl.arange(0, TOKENS, gl.SliceLayout(1, of_dxa))
    column = gl.arange(0, COLUMNS, gl.SliceLayout(1, of_dxa))
    r = gl.arange(0, R, gl.SliceLayout(0, of_dxa))
    for block in range(begin // tiles, (end + tiles - 1) // tiles):
        mbarrier.wait(b_full, b_phase)
        b_phase = b_phase ^ 1
        db = gl.zeros([COLUMNS, R], gl.float32, of_dxa)
        slab = dxa_ptr + gl.cast(block, gl.int64) * tokens * R
        first = gl.maximum(begin, block * tiles)
        for unit in range(first, gl.minimum(end, (block + 1) * tiles)):
            token = (unit - block * tiles) * TOKENS
            mbarrier.wait(full.index(stage), phase)
            dy = dys.index(stage)
            dxa = warpgroup_mma_init(gl.zeros([TOKENS, R], gl.float32, of_dxa))
            dxa = warpgroup_mma(dy, b_tile, dxa, use_acc=False, is_async=True)
            if NEED_B:
                db = warpgroup_mma(dy.permute((1, 0)), xas.index(stage), db, is_async=True)
                dxa, db = warpgroup_mma_wait(0, deps=(dxa, db))
            else:
                dxa = warpgroup_mma_wait(0, deps=(dxa,))
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
            rows = token + row
            gl.store(slab + rows[:, None] * R + r[None, :], dxa, mask=(rows < tokens)[:, None])
        mbarrier.arrive(b_empty, count=1)
        if NEED_B:
            part = gl.where(block >= blocks0 + blocks1, 2, gl.where(block >= blocks0, 1, 0))
            inside = block - gl.where(part == 2, blocks0 + blocks1, gl.where(part == 1, blocks0, 0))
            before = gl.where(part == 2, w0 + w1, gl.where(part == 1, w0, 0))
            width = gl.where(part == 2, w2, gl.where(part == 1, w1, w0))
            piece = gl.program_id(0) - block * tiles // each
            columns = inside * COLUMNS + column
            to = db_ptr + (piece.to(gl.int64) * columns_of_all + before) * R
            gl.store(to + columns[:, None] * R + r[None, :], db, mask=(columns < width)[:, None])


@gluon.jit(
    do_not_specialize=[
        "blocks0",
        "blocks1",
        "w0",
        "w1",
        "w2",
        "columns_of_all",
        "tokens",
        "tiles",
        "each",
        "total",
    ]
)
def grads_kernel(
    dy0, dy1, dy2, b0, b1, b2, xa0, xa1, xa2, dxa_ptr, db_ptr, blocks0, blocks1, w0, w1, w2, columns_of_all,
    tokens, tiles, each, total, R: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr, NEED_B: gl.constexpr,
):  # fmt: skip
    dys = gl.allocate_shared_memory(dy0.dtype, [STAGES, TOKENS, COLUMNS], dy0.layout)
    xas = gl.allocate_shared_memory(dy0.dtype, [STAGES, TOKENS, R], xa0.layout)
    b_tile = gl.allocate_shared_memory(dy0.dtype, [COLUMNS, R], b0.layout)
    full, empty = ring(STAGES, 1)
    of_b_full, of_b_empty = ring(1, 1)
    b_full = of_b_full.index(0)
    b_empty = of_b_empty.index(0)
    begin = gl.program_id(0) * each
    end = gl.minimum(begin + each, total)
    given = (dy0, dy1, dy2, b0, b1, b2, xa0, xa1, xa2)
    gl.warp_specialize(
        [
            (_group, (dys, xas, b_tile, full, empty, b_full, b_empty, dxa_ptr, db_ptr, blocks0, blocks1, w0, w1, w2,
                      columns_of_all, tokens, tiles, each, begin, end, STAGES, NEED_B)),
            (_copy, (given, dys, xas, b_tile, full, empty, b_full, b_empty, blocks0, blocks1, tiles, begin, end,
                     STAGES)),
        ],
        [1],
        [96],
    )  # fmt: skip


def suits(dys: Sequence[Tensor], bs: Sequence[Tensor], xa: Tensor) -> bool:
    """Whether the kernel takes these, and has enough tiles to be worth its start."""
    ranks = [b.shape[1] for b in bs]
    padded, tokens = rank_block(ranks), dys[0].shape[0]
    if padded not in TILES or any(rank % 8 for rank in ranks) or not aligned(*dys, *bs, xa):
        return False
    if any(x.dtype != dys[0].dtype for x in (*dys, *bs, xa)):
        return False
    blocks = sum(triton.cdiv(dy.shape[1], TILES[padded][0]) for dy in dys)
    return triton.cdiv(tokens, TOKENS.value) * blocks >= LEAST_TILES * processors(dys[0].device.index or 0)


def output_grads(
    dys: Sequence[Tensor], bs: Sequence[Tensor], xas: Sequence[Tensor], need_b: bool
) -> Partials:
    """Partial dXA and dB of operands that `suits` has nothing against."""
    tokens, widths, ranks = dys[0].shape[0], [dy.shape[1] for dy in dys], [b.shape[1] for b in bs]
    device, padded = dys[0].device, rank_block(ranks)
    block, stages = TILES[padded]
    blocks = [triton.cdiv(width, block) for width in widths]
    shares = shares_of(tokens, sum(blocks), processors(device.index or 0))
    dxa = torch.empty(sum(blocks), tokens, padded, dtype=torch.float32, device=device)
    pieces = shares.pieces(sum(blocks)) if need_b else 0
    db = torch.empty(pieces, sum(widths), padded, dtype=torch.float32, device=device)
    grads_kernel[(shares.programs,)](
        *[tiles_of(dy, TOKENS.value, block) for dy in three(list(dys))],
        *[tiles_of(b, 256, padded) for b in three(list(bs))],
        *[tiles_of(xa, TOKENS.value, padded) for xa in three(list(xas))],
        dxa, db, *three(blocks)[:2], *three(widths), sum(widths), tokens, shares.tiles, shares.each,
        shares.tiles * sum(blocks), R=padded, COLUMNS=block, STAGES=stages, NEED_B=need_b, num_warps=4,
    )  # fmt: skip
    return Partials(dxa, db, tuple(ranks), tuple(widths), tuple(blocks), shares.tiles, shares.each, block)
