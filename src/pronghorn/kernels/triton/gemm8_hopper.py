"""The product of int8 codes on Hopper, written in Gluon (Triton's language of explicit layouts and warps).

One warp copies tiles of codes into a ring of stages; two warp groups multiply, each its own 64 rows of a tile with
all 256 columns. They run half the ring apart, so that one of them keeps the matrix units busy while the other scales
and writes its results.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from pronghorn.kernels.triton.gemm8 import Call
from pronghorn.kernels.triton.gluon_parts import (
    fetch,
    next_stage,
    place,
    put_back,
    quarters,
    ring,
    tiles_of,
    view,
)
from pronghorn.kernels.triton.launch import processors

BM = gl.constexpr(128)
BN = gl.constexpr(256)
BK = gl.constexpr(128)
#: stages of codes in shared memory; the second warp group runs LAG of them behind the first
STAGES = gl.constexpr(4)
LAG = gl.constexpr(2)
#: columns of a tile that are written at a time
WIDTH = gl.constexpr(64)
#: rows of tiles that are gone through together
GROUP = gl.constexpr(16)


@gluon.jit
def _copy(
    left_desc, right_desc, xa_desc, b_desc, residual_desc, left, right, full, empty, m, n, k, programs,
    R: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """The copying warp: stages of codes, tile by tile; what is added to a tile comes through the same stages."""
    tiles = gl.cdiv(m, BM) * gl.cdiv(n, BN)
    stage = 0
    phase = 1
    for index in range(gl.program_id(0), tiles, programs):
        tile_m, tile_n = place(index, gl.cdiv(m, BM), gl.cdiv(n, BN), GROUP)
        at_m, at_n = tile_m * BM, tile_n * BN
        for step in range(gl.cdiv(k, BK)):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, (BM + BN) * BK)
            for g in gl.static_range(2):
                fetch(left_desc, [at_m + 64 * g, step * BK], bar, left.index(2 * stage + g))
            fetch(right_desc, [at_n, step * BK], bar, right.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
        if RESIDUAL:
            for g in gl.static_range(2):
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(bar, 64 * BN * 2)
                rest = view(right.index(stage), residual_desc.dtype, [256, WIDTH], residual_desc.layout)
                for i in gl.static_range(4):
                    fetch(residual_desc, [at_m + 64 * g, at_n + i * WIDTH], bar, rest.slice(64 * i, 64))
                stage, phase = next_stage(stage, phase, STAGES)
        if R:
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, (BM + BN) * R * 2)
            for g in gl.static_range(2):
                xa = view(left.index(2 * stage + g), xa_desc.dtype, [64, R], xa_desc.layout)
                fetch(xa_desc, [at_m + 64 * g, 0], bar, xa)
            fetch(b_desc, [at_n, 0], bar, view(right.index(stage), b_desc.dtype, [BN, R], b_desc.layout))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _column_scales(column_ptr, at_n, n):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    columns = at_n + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    return gl.load(column_ptr + columns, mask=columns < n, other=0.0)


@gluon.jit
def _scaled(acc, row_scales, column_scales):
    layout: gl.constexpr = row_scales.type.layout.parent
    return gl.convert_layout(acc, layout).to(gl.float32) * row_scales[:, None] * column_scales[None, :]


@gluon.jit
def _loaded(x, layout: gl.constexpr):
    return x.load(layout).to(gl.float32)


@gluon.jit
def _write_part(out, at_m, at_n, xa, b, out_desc, buffer, scaling, R: gl.constexpr):
    if R:
        # The adapter's product adds to the rest in the accumulator: s · (rest / s + XA Bᵀ).
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
        out = warpgroup_mma(xa, b.permute((1, 0)), gl.convert_layout(out * (1.0 / scaling), layout))
        out *= scaling
    # Two buffers take turns: the one before last has been read.
    tma.store_wait(1)
    buffer.store(out.to(out_desc.dtype))
    fence_async_shared()
    put_back(out_desc, [at_m, at_n], buffer)


@gluon.jit
def _multiply(
    left, right, full, empty, buffers, xa_desc, b_desc, residual_desc, out_desc, row_ptr, column_ptr,
    scaling, m, n, k, programs, g: gl.constexpr, R: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """A warp group: 64 rows of each tile."""
    # Instructions 128 columns wide: two of them a step of a tile.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    tiles = gl.cdiv(m, BM) * gl.cdiv(n, BN)
    stage = 0
    phase = 0
    if g > 0:
        # Begin behind the other group, and stay there.
        mbarrier.wait(full.index(LAG), 0, pred=gl.cdiv(k, BK) > LAG)
    for index in range(gl.program_id(0), tiles, programs):
        tile_m, tile_n = place(index, gl.cdiv(m, BM), gl.cdiv(n, BN), GROUP)
        at_m, at_n = tile_m * BM, tile_n * BN
        at_m += 64 * g
        mbarrier.wait(full.index(stage), phase)
        acc = warpgroup_mma(
            left.index(2 * stage + g), right.index(stage).permute((1, 0)),
            warpgroup_mma_init(gl.zeros([64, BN], gl.int32, layout)), use_acc=False, is_async=True,
        )  # fmt: skip
        before = stage
        stage, phase = next_stage(stage, phase, STAGES)
        for _ in range(1, gl.cdiv(k, BK)):
            mbarrier.wait(full.index(stage), phase)
            acc = warpgroup_mma(
                left.index(2 * stage + g), right.index(stage).permute((1, 0)), acc, is_async=True
            )
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
            mbarrier.arrive(empty.index(before), count=1)
            before = stage
            stage, phase = next_stage(stage, phase, STAGES)
        # The scales arrive while the last products are made.
        rows = at_m + gl.arange(0, 64, gl.SliceLayout(1, narrow))
        row_scales = gl.load(row_ptr + rows, mask=rows < m, other=0.0)
        column_scales = _column_scales(column_ptr, at_n, n)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(before), count=1)
        a0, a1, a2, a3 = quarters(acc)
        if RESIDUAL:
            # Each group takes its own stage, in order, and passes over the other's.
            for _ in gl.static_range(g):
                mbarrier.wait(full.index(stage), phase)
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = next_stage(stage, phase, STAGES)
            mbarrier.wait(full.index(stage), phase)
            rest = view(right.index(stage), residual_desc.dtype, [256, WIDTH], residual_desc.layout)
            a0 = _scaled(a0, row_scales, column_scales) + _loaded(rest.slice(0, 64), narrow)
            column_scales = _column_scales(column_ptr, at_n + WIDTH, n)
            a1 = _scaled(a1, row_scales, column_scales) + _loaded(rest.slice(64, 64), narrow)
            column_scales = _column_scales(column_ptr, at_n + 2 * WIDTH, n)
            a2 = _scaled(a2, row_scales, column_scales) + _loaded(rest.slice(128, 64), narrow)
            column_scales = _column_scales(column_ptr, at_n + 3 * WIDTH, n)
            a3 = _scaled(a3, row_scales, column_scales) + _loaded(rest.slice(192, 64), narrow)
            fence_async_shared()
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
            for _ in gl.static_range(1 - g):
                mbarrier.wait(full.index(stage), phase)
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = next_stage(stage, phase, STAGES)
        if R:
            mbarrier.wait(full.index(stage), phase)
        xa = view(left.index(2 * stage + g), xa_desc.dtype, [64, R or 64], xa_desc.layout)
        b = view(right.index(stage), b_desc.dtype, [BN, R or 64], b_desc.layout)
        for i in gl.static_range(4):
            part = a0 if i == 0 else a1 if i == 1 else a2 if i == 2 else a3
            if not RESIDUAL:
                part = _scaled(part, row_scales, column_scales)
                if i < 3:
                    column_scales = _column_scales(column_ptr, at_n + (i + 1) * WIDTH, n)
            _write_part(part, at_m, at_n + i * WIDTH, xa, b.slice(i * WIDTH, WIDTH), out_desc,
                        buffers.index(2 * g + i % 2), scaling, R)  # fmt: skip
        if R:
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
    tma.store_wait(0)


# A size of one would become a constant, and one more kernel.
@gluon.jit(do_not_specialize=["m", "n", "k", "programs"])
def gemm(
    left_desc, right_desc, out_desc, xa_desc, b_desc, residual_desc, row_ptr, column_ptr, scaling,
    m, n, k, programs, R: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    left = gl.allocate_shared_memory(left_desc.dtype, [2 * STAGES, 64, BK], left_desc.layout)
    right = gl.allocate_shared_memory(right_desc.dtype, [STAGES, BN, BK], right_desc.layout)
    buffers = gl.allocate_shared_memory(out_desc.dtype, [4, 64, WIDTH], out_desc.layout)
    full, empty = ring(STAGES, 2)
    gl.warp_specialize(
        [
            (_multiply, (left, right, full, empty, buffers, xa_desc, b_desc, residual_desc, out_desc, row_ptr,
                         column_ptr, scaling, m, n, k, programs, 0, R, RESIDUAL)),
            (_multiply, (left, right, full, empty, buffers, xa_desc, b_desc, residual_desc, out_desc, row_ptr,
                         column_ptr, scaling, m, n, k, programs, 1, R, RESIDUAL)),
            (_copy, (left_desc, right_desc, xa_desc, b_desc, residual_desc, left, right, full, empty,
                     m, n, k, programs, R, RESIDUAL)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def run(call: Call) -> None:
    """Launch, on a GPU that `why_not_hopper` has nothing against and for operands that `Call.why_not_tiles` has not."""
    m, n, k = call.sizes
    xa, b, residual, rank = call.xa, call.b, call.residual, call.rank or 64
    tiles = triton.cdiv(m, BM.value) * triton.cdiv(n, BN.value)
    count = min(tiles, processors(call.left.device.index or 0))
    gemm[(count,)](
        tiles_of(call.left, 64, BK.value), tiles_of(call.right, BN.value, BK.value),
        tiles_of(call.out, 64, WIDTH.value),
        tiles_of(call.out if xa is None else xa, 64, rank), tiles_of(call.out if b is None else b, BN.value, rank),
        tiles_of(call.out if residual is None else residual, 64, WIDTH.value),
        call.row_scales, call.column_scales, call.scaling, m, n, k, count,
        R=call.rank, RESIDUAL=residual is not None, num_warps=4,
    )  # fmt: skip
