"""The gated unit inside the products before and behind it on Hopper, written in Gluon (Triton's language of explicit
layouts and warps).

    forward   gate = x Wgᵀ + XA_g B_gᵀ,  up likewise,  act = f(gate) · up,  XA_d = act A_dᵀ
    backward  dact = dy W_d + dXA_d A_d,  dgate = dact · up · f'(gate),  dup = dact · f(gate),  dA_d = dXA_dᵀ act

One warp copies tiles into a ring of stages; two warp groups multiply, forward three where that pays, each its own 64
rows of a tile with all 256 columns, and finish their tile in registers. They run a part of the ring apart, so that one
of them keeps the matrix units busy while another finishes. What the adapters add is one more, narrow step of the
products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from pronghorn.kernels import glu_products
from pronghorn.kernels.glu_products import HALF as HALF_COLUMNS
from pronghorn.kernels.tiles import COLUMNS, ROWS, padded
from pronghorn.kernels.triton.gluon_parts import (
    begin_behind,
    bring,
    dealt,
    fetch,
    multiplied,
    next_stage,
    nth_tile,
    pass_over,
    put,
    put_back,
    quarters,
    ring,
    slab_of,
    tiles_of,
    value_and_slope,
    view,
)
from pronghorn.kernels.triton.launch import processors
from pronghorn.kernels.triton.lora_sums import sum_a_grads, sum_rows

if TYPE_CHECKING:
    from pronghorn.kernels.glu_products import DownGrad, GateUp

#: columns of a tile: of act backward; forward 128 of gate and the same 128 of up
BN = gl.constexpr(COLUMNS)
HALF = gl.constexpr(HALF_COLUMNS)
BM = gl.constexpr(ROWS)
BK = gl.constexpr(64)
#: stages in shared memory of two groups, and of three
STAGES = gl.constexpr(4)
STAGES_OF_THREE = gl.constexpr(3)
#: columns of a tile that are finished at a time
WIDTH = gl.constexpr(64)
#: rows of tiles that are gone through together, by two groups and by three, and columns of them backward
TOGETHER_OF_TWO = gl.constexpr(glu_products.TOGETHER[2])
TOGETHER_OF_THREE = gl.constexpr(glu_products.TOGETHER[3])
COLUMNS_TOGETHER = gl.constexpr(glu_products.COLUMNS_TOGETHER)


@gluon.jit
def _copy_forward(
    given, G: gl.constexpr, DEPTH: gl.constexpr, R: gl.constexpr, RD: gl.constexpr,
):  # fmt: skip
    (x_desc, gate_weight, up_weight, xa_desc, gate_b, up_b, a_desc, left, right, full, empty,
     m, n, k, programs, rest) = given  # fmt: skip
    TOGETHER: gl.constexpr = TOGETHER_OF_TWO if G == 2 else TOGETHER_OF_THREE
    tiles_m = gl.cdiv(m, 64 * G)
    tiles_n = gl.cdiv(n, HALF)
    stage = 0
    phase = 1
    own, count, turn = dealt(tiles_m, tiles_n, programs, rest, TOGETHER)
    for tile in range(count):
        tile_m, tile_n = nth_tile(tile, own, turn, tiles_m, tiles_n, programs, rest, TOGETHER)
        at_m = tile_m * (64 * G)
        at_n = tile_n * HALF
        if R:
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, (64 * G + BN) * 2 * R * 2)
            for g in gl.static_range(G):
                fetch(xa_desc, [at_m + 64 * g, 0], bar,
                      view(left.index(G * stage + g), xa_desc.dtype, [64, 2 * R], xa_desc.layout))  # fmt: skip
            # [B_g 0] over [0 B_u]: what lies beside a matrix is read as zero.
            b = view(right.index(stage), gate_b.dtype, [BN, 2 * R], gate_b.layout)
            fetch(gate_b, [at_n, 0], bar, b.slice(0, HALF))
            fetch(up_b, [at_n, -R], bar, b.slice(HALF, HALF))
            stage, phase = next_stage(stage, phase, DEPTH)
        for step in range(gl.cdiv(k, BK)):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, (64 * G + BN) * BK * 2)
            for g in gl.static_range(G):
                fetch(x_desc, [at_m + 64 * g, step * BK], bar, left.index(G * stage + g))
            fetch(gate_weight, [at_n, step * BK], bar, right.index(stage).slice(0, HALF))
            fetch(up_weight, [at_n, step * BK], bar, right.index(stage).slice(HALF, HALF))
            stage, phase = next_stage(stage, phase, DEPTH)
        if RD:
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, RD * HALF * 2)
            a = view(right.index(stage), a_desc.dtype, [2 * RD, WIDTH], a_desc.layout)
            for i in gl.static_range(2):
                fetch(a_desc, [0, at_n + i * WIDTH], bar, a.slice(RD * i, RD))
            stage, phase = next_stage(stage, phase, DEPTH)


@gluon.jit
def _forward_group(
    given, g: gl.constexpr, G: gl.constexpr, DEPTH: gl.constexpr, R: gl.constexpr, RD: gl.constexpr,
    KEEP: gl.constexpr, ACT: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    (left, right, full, empty, buffers, xa_desc, gate_b, a_desc, gate_out, up_out, act_out, partial_ptr,
     m, n, k, programs, period, rest) = given  # fmt: skip
    TOGETHER: gl.constexpr = TOGETHER_OF_TWO if G == 2 else TOGETHER_OF_THREE
    steps = gl.cdiv(k, BK) + (1 if R else 0)
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    of_xa: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, RD or 16, 16])
    as_left: gl.constexpr = gl.DotOperandLayout(0, of_xa, 2)
    kind: gl.constexpr = act_out.dtype
    WRITES: gl.constexpr = 2 * KEEP + ACT
    tiles_m = gl.cdiv(m, 64 * G)
    tiles_n = gl.cdiv(n, HALF)
    stage = 0
    phase = 0
    xa_down = gl.zeros([64, RD or 16], gl.float32, of_xa)
    begin_behind(full, steps, g, G, DEPTH)
    own, count, turn = dealt(tiles_m, tiles_n, programs, rest, TOGETHER)
    for tile in range(count):
        tile_m, tile_n = nth_tile(tile, own, turn, tiles_m, tiles_n, programs, rest, TOGETHER)
        slab, last = slab_of(
            tile, own, count, turn, tile_n, tiles_m, tiles_n, programs, period, rest, TOGETHER
        )
        at_m = tile_m * (64 * G) + 64 * g
        at_n = tile_n * HALF
        xa = view(left.index(G * stage + g), xa_desc.dtype, [64, 2 * R or 16], xa_desc.layout)
        b = view(right.index(stage), gate_b.dtype, [BN, 2 * R or 16], gate_b.layout)
        acc, stage, phase = multiplied(
            left, right, full, empty, xa, b.permute((1, 0)), stage, phase, steps, g, G, DEPTH, R > 0, True
        )
        gate0, gate1, up0, up1 = quarters(acc)
        if RD:
            mbarrier.wait(full.index(stage), phase)
        a = view(right.index(stage), a_desc.dtype, [2 * (RD or 16), WIDTH], a_desc.layout)
        for i in gl.static_range(2):
            at = at_n + i * WIDTH
            gate = gl.convert_layout(gate0 if i == 0 else gate1, narrow).to(kind)
            up = gl.convert_layout(up0 if i == 0 else up1, narrow).to(kind)
            if KEEP:
                put(gate_out, at_m, at, gate, buffers, 2 * g + i * WRITES % 2)
                put(up_out, at_m, at, up, buffers, 2 * g + (i * WRITES + 1) % 2)
            if KIND != "none":
                value, _ = value_and_slope(gate.to(gl.float32), KIND)
                act = (value * up.to(gl.float32)).to(kind)
                if ACT:
                    put(act_out, at_m, at, act, buffers, 2 * g + (i * WRITES + WRITES - 1) % 2)
                if RD:
                    xa_down = warpgroup_mma(
                        gl.convert_layout(act, as_left),
                        a.slice((RD or 16) * i, RD or 16).permute((1, 0)),
                        xa_down,
                    )
        if RD:
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, DEPTH)
            if last:
                rows = at_m + gl.arange(0, 64, gl.SliceLayout(1, of_xa))
                r = gl.arange(0, RD, gl.SliceLayout(0, of_xa))
                to = partial_ptr + slab.to(gl.int64) * m * RD + rows[:, None] * RD + r[None, :]
                gl.store(to, xa_down, mask=(rows < m)[:, None])
            xa_down = gl.where(last, 0.0, xa_down)
    tma.store_wait(0)


# A size of one would become a constant, and one more kernel.
@gluon.jit(do_not_specialize=["m", "n", "k", "programs", "period", "rest"])
def forward_kernel(
    x_desc, gate_weight, up_weight, xa_desc, gate_b, up_b, a_desc, gate_out, up_out, act_out, partial_ptr,
    m, n, k, programs, period, rest, G: gl.constexpr, R: gl.constexpr, RD: gl.constexpr, KEEP: gl.constexpr,
    ACT: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    DEPTH: gl.constexpr = STAGES if G == 2 else STAGES_OF_THREE
    left = gl.allocate_shared_memory(x_desc.dtype, [G * DEPTH, 64, BK], x_desc.layout)
    right = gl.allocate_shared_memory(x_desc.dtype, [DEPTH, BN, BK], gate_weight.layout)
    buffers = gl.allocate_shared_memory(act_out.dtype, [2 * G, 64, WIDTH], act_out.layout)
    full, empty = ring(DEPTH, G)
    of_group = (left, right, full, empty, buffers, xa_desc, gate_b, a_desc, gate_out, up_out, act_out, partial_ptr,
                m, n, k, programs, period, rest)  # fmt: skip
    of_copy = (x_desc, gate_weight, up_weight, xa_desc, gate_b, up_b, a_desc, left, right, full, empty,
               m, n, k, programs, rest)  # fmt: skip
    if G == 2:
        gl.warp_specialize(
            [
                (_forward_group, (of_group, 0, G, DEPTH, R, RD, KEEP, ACT, KIND)),
                (_forward_group, (of_group, 1, G, DEPTH, R, RD, KEEP, ACT, KIND)),
                (_copy_forward, (of_copy, G, DEPTH, R, RD)),
            ],
            [4, 1],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_forward_group, (of_group, 0, G, DEPTH, R, RD, KEEP, ACT, KIND)),
                (_forward_group, (of_group, 1, G, DEPTH, R, RD, KEEP, ACT, KIND)),
                (_forward_group, (of_group, 2, G, DEPTH, R, RD, KEEP, ACT, KIND)),
                (_copy_forward, (of_copy, G, DEPTH, R, RD)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


@gluon.jit
def _copy_backward(
    dy_desc, weight, dxa_desc, a_desc, gate_desc, up_desc, left, right, full, empty, m, n, k, programs, rest,
    R: gl.constexpr,
):  # fmt: skip
    tiles_m = gl.cdiv(m, BM)
    tiles_n = gl.cdiv(n, BN)
    stage = 0
    phase = 1
    own, count, turn = dealt(tiles_n, tiles_m, programs, rest, COLUMNS_TOGETHER)
    for tile in range(count):
        tile_n, tile_m = nth_tile(tile, own, turn, tiles_n, tiles_m, programs, rest, COLUMNS_TOGETHER)
        at_m = tile_m * BM
        at_n = tile_n * BN
        stage, phase = bring(
            dy_desc, weight, dxa_desc, a_desc, left, right, full, empty, at_m, at_n, k, stage, phase, 2, STAGES, R,
            False,
        )  # fmt: skip
        # Gate and up of 128 columns a stage, two stages for each group; dXA in the group's place of the left side.
        for g in gl.static_range(2):
            for part in gl.static_range(2):
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(bar, 64 * BN * 2 + 64 * R * 2)
                both = view(right.index(stage), gate_desc.dtype, [BN, WIDTH], gate_desc.layout)
                for i in gl.static_range(2):
                    at = at_n + (2 * part + i) * WIDTH
                    fetch(gate_desc, [at_m + 64 * g, at], bar, both.slice(128 * i, 64))
                    fetch(up_desc, [at_m + 64 * g, at], bar, both.slice(128 * i + 64, 64))
                if R:
                    fetch(dxa_desc, [at_m + 64 * g, 0], bar,
                          view(left.index(2 * stage), dxa_desc.dtype, [64, R], dxa_desc.layout))  # fmt: skip
                stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _backward_part(
    dact, gate_tile, up_tile, act_tile, dxa, gate_desc, up_desc, da, at_m, at_n,
    R: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    """64 columns: gradients of gate and up take their place, here and in memory; dA [64, R] with what they add."""
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    kind: gl.constexpr = gate_desc.dtype
    dact = gl.convert_layout(dact, narrow)
    value, slope = value_and_slope(gate_tile.load(narrow).to(gl.float32), KIND)
    up = up_tile.load(narrow).to(gl.float32)
    gate_tile.store((dact * up * slope).to(kind))
    up_tile.store((dact * value).to(kind))
    if R:
        act_tile.store((value * up).to(kind))
    fence_async_shared()
    put_back(gate_desc, [at_m, at_n], gate_tile)
    put_back(up_desc, [at_m, at_n], up_tile)
    if R:
        da = warpgroup_mma(act_tile.permute((1, 0)), dxa, da)
    return da


@gluon.jit
def _write_da(partial_ptr, da, piece, at_n, n, rank, R: gl.constexpr):
    layout: gl.constexpr = da.type.layout
    columns = at_n + gl.arange(0, 64, gl.SliceLayout(1, layout))
    r = gl.arange(0, R, gl.SliceLayout(0, layout))
    to = partial_ptr + piece.to(gl.int64) * n * rank + r[None, :] * n + columns[:, None]
    gl.store(to, da, mask=(columns < n)[:, None] & (r < rank)[None, :])


@gluon.jit
def _backward_group(
    left, right, full, empty, dxa_desc, a_desc, gate_desc, up_desc, partial_ptr, m, n, k, rank, programs, period, rest,
    g: gl.constexpr, R: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    of_da: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, R or 16, 16])
    tiles_m = gl.cdiv(m, BM)
    tiles_n = gl.cdiv(n, BN)
    da0 = gl.zeros([64, R or 16], gl.float32, of_da)
    da1 = da0
    da2 = da0
    da3 = da0
    stage = 0
    phase = 0
    steps = gl.cdiv(k, BK) + (1 if R else 0)
    begin_behind(full, steps, g, 2, STAGES)
    own, count, turn = dealt(tiles_n, tiles_m, programs, rest, COLUMNS_TOGETHER)
    for tile in range(count):
        tile_n, tile_m = nth_tile(tile, own, turn, tiles_n, tiles_m, programs, rest, COLUMNS_TOGETHER)
        slab, last = slab_of(
            tile, own, count, turn, tile_m, tiles_n, tiles_m, programs, period, rest, COLUMNS_TOGETHER
        )
        at_m = tile_m * BM + 64 * g
        at_n = tile_n * BN
        dxa = view(left.index(2 * stage + g), dxa_desc.dtype, [64, R or 16], dxa_desc.layout)
        a = view(right.index(stage), a_desc.dtype, [R or 16, BN], a_desc.layout)
        acc, stage, phase = multiplied(
            left, right, full, empty, dxa, a, stage, phase, steps, g, 2, STAGES, R > 0, False
        )
        d0, d1, d2, d3 = quarters(acc)
        stage, phase = pass_over(full, empty, stage, phase, 2 * g, STAGES)
        for part in gl.static_range(2):
            mbarrier.wait(full.index(stage), phase)
            both = view(right.index(stage), gate_desc.dtype, [BN, WIDTH], gate_desc.layout)
            dxa = view(left.index(2 * stage), dxa_desc.dtype, [64, R or 16], dxa_desc.layout)
            act_tile = view(left.index(2 * stage + 1), gate_desc.dtype, [64, WIDTH], gate_desc.layout)
            for i in gl.static_range(2):
                dact = (d0 if i == 0 else d1) if part == 0 else (d2 if i == 0 else d3)
                da = (da0 if i == 0 else da1) if part == 0 else (da2 if i == 0 else da3)
                da = _backward_part(
                    dact, both.slice(128 * i, 64), both.slice(128 * i + 64, 64), act_tile, dxa, gate_desc, up_desc,
                    da, at_m, at_n + (2 * part + i) * WIDTH, R, KIND,
                )  # fmt: skip
                if part == 0:
                    if i == 0:
                        da0 = da
                    else:
                        da1 = da
                else:
                    if i == 0:
                        da2 = da
                    else:
                        da3 = da
            tma.store_wait(0)
            fence_async_shared()
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
        stage, phase = pass_over(full, empty, stage, phase, 2 - 2 * g, STAGES)
        if R:
            if last:
                piece = 2 * slab + g
                _write_da(partial_ptr, da0, piece, at_n, n, rank, R)
                _write_da(partial_ptr, da1, piece, at_n + WIDTH, n, rank, R)
                _write_da(partial_ptr, da2, piece, at_n + 2 * WIDTH, n, rank, R)
                _write_da(partial_ptr, da3, piece, at_n + 3 * WIDTH, n, rank, R)
            da0 = gl.where(last, 0.0, da0)
            da1 = gl.where(last, 0.0, da1)
            da2 = gl.where(last, 0.0, da2)
            da3 = gl.where(last, 0.0, da3)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["m", "n", "k", "rank", "programs", "period", "rest"])
def backward_kernel(
    dy_desc, weight, dxa_desc, a_desc, gate_desc, up_desc, partial_ptr, m, n, k, rank, programs, period, rest,
    R: gl.constexpr, KIND: gl.constexpr,
):  # fmt: skip
    left = gl.allocate_shared_memory(dy_desc.dtype, [2 * STAGES, 64, BK], dy_desc.layout)
    right = gl.allocate_shared_memory(dy_desc.dtype, [STAGES, BK, BN], weight.layout)
    full, empty = ring(STAGES, 2)
    gl.warp_specialize(
        [
            (_backward_group, (left, right, full, empty, dxa_desc, a_desc, gate_desc, up_desc, partial_ptr,
                               m, n, k, rank, programs, period, rest, 0, R, KIND)),
            (_backward_group, (left, right, full, empty, dxa_desc, a_desc, gate_desc, up_desc, partial_ptr,
                               m, n, k, rank, programs, period, rest, 1, R, KIND)),
            (_copy_backward, (dy_desc, weight, dxa_desc, a_desc, gate_desc, up_desc, left, right, full, empty,
                              m, n, k, programs, rest, R)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def forward(call: GateUp, gate: Tensor, up: Tensor, act: Tensor | None, xa_down: Tensor | None) -> None:
    """Fill what is given; gate and up are the output they would be written to, whatever `call.keep` says."""
    x, xa, a = call.x, call.xa, call.a
    (m, k), n = x.shape, call.gate_weight.shape[0]
    rank, rank_down = 0 if xa is None else xa.shape[1] // 2, 0 if a is None else padded(a.shape[0])
    out = gate if act is None else act
    groups, order, sums = glu_products.forward_tiling(m, n, processors(x.device.index or 0))
    partial = x.new_empty(sums.most, m, rank_down, dtype=torch.float32) if rank_down else out
    wide = 2 * rank or 16
    forward_kernel[(order.programs,)](
        tiles_of(x, 64, BK.value), tiles_of(call.gate_weight, HALF.value, BK.value),
        tiles_of(call.up_weight, HALF.value, BK.value), tiles_of(x if xa is None else xa, 64, wide),
        tiles_of(x if xa is None else call.gate_b, HALF.value, wide),
        tiles_of(x if xa is None else call.up_b, HALF.value, wide),
        tiles_of(x if a is None else a, rank_down or 16, WIDTH.value), tiles_of(gate, 64, WIDTH.value),
        tiles_of(up, 64, WIDTH.value), tiles_of(out, 64, WIDTH.value), partial, m, n, k,
        order.programs, order.period, order.rest, G=groups, R=rank, RD=rank_down,
        KEEP=call.keep or act is None, ACT=act is not None,
        KIND="none" if act is None and a is None else call.activation, num_warps=4,
    )  # fmt: skip
    if xa_down is not None:
        sum_rows(partial, xa_down, sums)


def backward(call: DownGrad) -> None:
    """gate and up become their gradients, and `a_grad` takes its own in."""
    dy, weight, gate, up = call.dy, call.weight, call.gate, call.up
    (m, k), n = dy.shape, weight.shape[1]
    rank = 0 if call.a is None else call.a.shape[0]
    _, order, sums = glu_products.backward_tiling(m, n, processors(dy.device.index or 0))
    partial = dy.new_empty(sums.most, rank, n, dtype=torch.float32) if rank else gate
    backward_kernel[(order.programs,)](
        tiles_of(dy, 64, BK.value), tiles_of(weight, BK.value, BN.value),
        tiles_of(dy if call.dxa is None else call.dxa, 64, padded(rank) or 16),
        tiles_of(dy if call.a is None else call.a, padded(rank) or 16, BN.value),
        tiles_of(gate, 64, WIDTH.value), tiles_of(up, 64, WIDTH.value), partial, m, n, k, rank,
        order.programs, order.period, order.rest, R=padded(rank), KIND=call.activation, num_warps=4,
    )  # fmt: skip
    if call.a_grad is not None:
        sum_a_grads(partial, call.a_grad, sums)
