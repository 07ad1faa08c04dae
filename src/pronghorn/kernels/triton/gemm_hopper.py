"""Products of tall matrices in 16 bits on Hopper, with what an adapter adds and a residual, written in Gluon (Triton's
language of explicit layouts and warps).

    out = x Wᵀ + XA Bᵀ + residual        or        dx = dy W + dXA A

As in `glu_hopper` one warp copies tiles into a ring of stages and two warp groups multiply, each its own 64 rows of a
tile with all 256 columns. The adapter is one more, narrow step; the residual comes through the ring behind a tile.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from pronghorn.kernels.products import Product
from pronghorn.kernels.tiles import COLUMNS, ROWS
from pronghorn.kernels.triton.gluon_parts import (
    begin_behind,
    bring,
    fetch,
    multiplied,
    next_stage,
    pass_over,
    place,
    put,
    quarters,
    ring,
    tiles_of,
    view,
)
from pronghorn.kernels.triton.launch import processors

BM = gl.constexpr(ROWS)
BN = gl.constexpr(COLUMNS)
BK = gl.constexpr(64)
STAGES = gl.constexpr(4)
#: columns of a tile that are finished at a time
WIDTH = gl.constexpr(64)
#: rows of tiles that are gone through together
GROUP = gl.constexpr(16)


@gluon.jit
def _copy(
    x_desc, w_desc, xa_desc, b_desc, residual_desc, left, right, full, empty, m, n, k, programs,
    R: gl.constexpr, TURN: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    stage = 0
    phase = 1
    for index in range(gl.program_id(0), gl.cdiv(m, BM) * gl.cdiv(n, BN), programs):
        tile_m, tile_n = place(index, gl.cdiv(m, BM), gl.cdiv(n, BN), GROUP)
        at_m = tile_m * BM
        at_n = tile_n * BN
        stage, phase = bring(
            x_desc, w_desc, xa_desc, b_desc, left, right, full, empty, at_m, at_n, k, stage, phase, 2, STAGES, R, TURN
        )  # fmt: skip
        if RESIDUAL:
            for g in gl.static_range(2):
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(bar, 64 * BN * 2)
                rest = view(right.index(stage), residual_desc.dtype, [BN, WIDTH], residual_desc.layout)
                for i in gl.static_range(4):
                    fetch(residual_desc, [at_m + 64 * g, at_n + i * WIDTH], bar, rest.slice(64 * i, 64))
                stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _group(
    left, right, full, empty, buffers, xa_desc, b_desc, residual_desc, out_desc, m, n, k, programs,
    g: gl.constexpr, R: gl.constexpr, TURN: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    steps = gl.cdiv(k, BK) + (1 if R else 0)
    stage = 0
    phase = 0
    begin_behind(full, steps, g, 2, STAGES)
    for index in range(gl.program_id(0), gl.cdiv(m, BM) * gl.cdiv(n, BN), programs):
        tile_m, tile_n = place(index, gl.cdiv(m, BM), gl.cdiv(n, BN), GROUP)
        at_m = tile_m * BM + 64 * g
        at_n = tile_n * BN
        xa = view(left.index(2 * stage + g), xa_desc.dtype, [64, R or 16], xa_desc.layout)
        if TURN:
            b = view(right.index(stage), b_desc.dtype, [BN, R or 16], b_desc.layout).permute((1, 0))
        else:
            b = view(right.index(stage), b_desc.dtype, [R or 16, BN], b_desc.layout)
        acc, stage, phase = multiplied(
            left, right, full, empty, xa, b, stage, phase, steps, g, 2, STAGES, R > 0, TURN
        )
        a0, a1, a2, a3 = quarters(acc)
        if RESIDUAL:
            stage, phase = pass_over(full, empty, stage, phase, g, STAGES)
            mbarrier.wait(full.index(stage), phase)
        rest = view(right.index(stage), residual_desc.dtype, [BN, WIDTH], residual_desc.layout)
        for i in gl.static_range(4):
            part = gl.convert_layout(a0 if i == 0 else a1 if i == 1 else a2 if i == 2 else a3, narrow)
            if RESIDUAL:
                part += rest.slice(64 * i, 64).load(narrow).to(gl.float32)
            put(out_desc, at_m, at_n + i * WIDTH, part.to(out_desc.dtype), buffers, 2 * g + i % 2)
        if RESIDUAL:
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
            stage, phase = pass_over(full, empty, stage, phase, 1 - g, STAGES)
    tma.store_wait(0)


# A size of one would become a constant, and one more kernel.
@gluon.jit(do_not_specialize=["m", "n", "k", "programs"])
def product_kernel(
    x_desc, w_desc, xa_desc, b_desc, residual_desc, out_desc, m, n, k, programs, R: gl.constexpr,
    TURN: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    left = gl.allocate_shared_memory(x_desc.dtype, [2 * STAGES, 64, BK], x_desc.layout)
    right = gl.allocate_shared_memory(
        x_desc.dtype, [STAGES, BN, BK] if TURN else [STAGES, BK, BN], w_desc.layout
    )
    buffers = gl.allocate_shared_memory(out_desc.dtype, [4, 64, WIDTH], out_desc.layout)
    full, empty = ring(STAGES, 2)
    gl.warp_specialize(
        [
            (_group, (left, right, full, empty, buffers, xa_desc, b_desc, residual_desc, out_desc, m, n, k, programs,
                      0, R, TURN, RESIDUAL)),
            (_group, (left, right, full, empty, buffers, xa_desc, b_desc, residual_desc, out_desc, m, n, k, programs,
                      1, R, TURN, RESIDUAL)),
            (_copy, (x_desc, w_desc, xa_desc, b_desc, residual_desc, left, right, full, empty, m, n, k, programs,
                     R, TURN, RESIDUAL)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def run(product: Product, out: Tensor) -> None:
    """out = the product, on a GPU and for operands that `products.why_not` has nothing against."""
    x, residual = product.x, product.residual
    (m, k), n, rank = x.shape, out.shape[1], product.padded_rank
    xa, b = (x, x) if product.xa is None or product.b is None else (product.xa, product.b)
    count = min(triton.cdiv(m, BM.value) * triton.cdiv(n, BN.value), processors(x.device.index or 0))
    of_w, of_b = (BN.value, BK.value), (BN.value, rank or 16)
    product_kernel[(count,)](
        tiles_of(x, 64, BK.value), tiles_of(product.weight, *(of_w if product.turned else of_w[::-1])),
        tiles_of(xa, 64, rank or 16), tiles_of(b, *(of_b if product.turned else of_b[::-1])),
        tiles_of(out if residual is None else residual, 64, WIDTH.value), tiles_of(out, 64, WIDTH.value),
        m, n, k, count, R=rank, TURN=product.turned, RESIDUAL=residual is not None, num_warps=4,
    )  # fmt: skip
