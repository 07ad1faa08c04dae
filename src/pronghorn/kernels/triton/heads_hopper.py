"""q, k and v with adapters and rotation in one product on Hopper, written in Gluon (Triton's language of explicit
layouts and warps): see `kernels.heads`.

As in `gemm_hopper`; a tile of 256 columns holds two heads, whose halves are its quarters, so that what turns together
is in one thread.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from pronghorn.kernels.heads import Heads
from pronghorn.kernels.tiles import groups_of, padded
from pronghorn.kernels.triton.gemm_hopper import BK, BN, GROUP, STAGES
from pronghorn.kernels.triton.gluon_parts import (
    begin_behind,
    bring,
    fetch,
    halves,
    multiplied,
    next_stage,
    place,
    put_back,
    put_ready,
    quarters,
    ring,
    tiles_of,
    view,
)
from pronghorn.kernels.triton.launch import processors

#: stages of three groups, and rows of tiles that they go through together
STAGES_OF_THREE = gl.constexpr(3)
GROUP_OF_THREE = gl.constexpr(11)
#: columns of a tile that are turned at a time, and half a head's
WIDTH = gl.constexpr(32)
HALF = gl.constexpr(64)


@gluon.jit
def _part_of(at_n, w0, w1):
    """0, 1, 2 for a column of q, k, v, and where that one begins."""
    part = gl.where(at_n >= w0 + w1, 2, gl.where(at_n >= w0, 1, 0))
    return part, gl.where(part == 2, w0 + w1, gl.where(part == 1, w0, 0))


@gluon.jit
def _copy(of_copy, G: gl.constexpr, DEPTH: gl.constexpr, R: gl.constexpr):
    (x_desc, w_desc, xa_desc, bs, left, right, full, empty, m, n, k, w0, w1, rank, programs) = of_copy
    (b0, b1, b2) = bs
    stage = 0
    phase = 1
    for index in range(gl.program_id(0), gl.cdiv(m, 64 * G) * gl.cdiv(n, BN), programs):
        tile_m, tile_n = place(index, gl.cdiv(m, 64 * G), gl.cdiv(n, BN), GROUP if G == 2 else GROUP_OF_THREE)
        at_m = tile_m * (64 * G)
        at_n = tile_n * BN
        part, first = _part_of(at_n, w0, w1)
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(bar, (64 * G + BN) * R * 2)
        for g in gl.static_range(G):
            to = view(left.index(G * stage + g), xa_desc.dtype, [64, R], xa_desc.layout)
            fetch(xa_desc, [at_m + 64 * g, part * rank], bar, to)
        to = view(right.index(stage), b0.dtype, [BN, R], b0.layout)
        if part == 0:
            fetch(b0, [at_n - first, 0], bar, to)
        elif part == 1:
            fetch(b1, [at_n - first, 0], bar, to)
        else:
            fetch(b2, [at_n - first, 0], bar, to)
        stage, phase = next_stage(stage, phase, DEPTH)
        stage, phase = bring(
            x_desc, w_desc, xa_desc, b0, left, right, full, empty, at_m, at_n, k, stage, phase, G, DEPTH, 0, True
        )  # fmt: skip


@gluon.jit
def _put(outs, part, at_m, at_n, x, buffers, turn: gl.constexpr):
    """A tile to memory; see `gluon_parts.put`."""
    (q_out, k_out, v_out) = outs
    buffer = put_ready(x, buffers, turn)
    if part == 0:
        put_back(q_out, [at_m, at_n], buffer)
    elif part == 1:
        put_back(k_out, [at_m, at_n], buffer)
    else:
        put_back(v_out, [at_m, at_n], buffer)


@gluon.jit
def _group(of_group, g: gl.constexpr, G: gl.constexpr, DEPTH: gl.constexpr, R: gl.constexpr):
    (left, right, full, empty, buffers, xa_desc, b_desc, outs, cos_ptr, sin_ptr, m, n, k, w0, w1, stride,
     programs) = of_group  # fmt: skip
    narrow: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    kind: gl.constexpr = outs[0].dtype
    steps = gl.cdiv(k, BK) + 1
    stage = 0
    phase = 0
    begin_behind(full, steps, g, G, DEPTH)
    row = gl.arange(0, 64, gl.SliceLayout(1, narrow))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, narrow))
    for index in range(gl.program_id(0), gl.cdiv(m, 64 * G) * gl.cdiv(n, BN), programs):
        tile_m, tile_n = place(index, gl.cdiv(m, 64 * G), gl.cdiv(n, BN), GROUP if G == 2 else GROUP_OF_THREE)
        at_m = tile_m * (64 * G) + 64 * g
        part, first = _part_of(tile_n * BN, w0, w1)
        at_n = tile_n * BN - first
        xa = view(left.index(G * stage + g), xa_desc.dtype, [64, R], xa_desc.layout)
        b = view(right.index(stage), b_desc.dtype, [BN, R], b_desc.layout).permute((1, 0))
        acc, stage, phase = multiplied(
            left, right, full, empty, xa, b, stage, phase, steps, g, G, DEPTH, True, True
        )
        a0, a1, a2, a3 = quarters(acc)
        # Of v nothing turns: angle 0.
        turns = ((at_m + row) < gl.where(part < 2, m, 0))[:, None]
        angle = (at_m + row).to(gl.int64)[:, None] * stride + column[None, :]
        for i in gl.static_range(2):
            for second in gl.static_range(2):
                at = angle + second * HALF + i * WIDTH
                c = gl.load(cos_ptr + at, mask=turns, other=1.0).to(gl.float32)
                s = gl.load(sin_ptr + at, mask=turns, other=0.0).to(gl.float32)
                for head in gl.static_range(2):
                    x0, x1 = halves(a0 if head == 0 else a2)
                    y0, y1 = halves(a1 if head == 0 else a3)
                    x = gl.convert_layout(x0 if i == 0 else x1, narrow)
                    y = gl.convert_layout(y0 if i == 0 else y1, narrow)
                    if second:
                        turned = y * c + x * s
                    else:
                        turned = x * c - y * s
                    _put(
                        outs, part, at_m, at_n + 2 * HALF * head + second * HALF + i * WIDTH, turned.to(kind),
                        buffers, 2 * g + head,
                    )  # fmt: skip
    tma.store_wait(0)


# A size of one would become a constant, and one more kernel.
@gluon.jit(do_not_specialize=["m", "n", "k", "w0", "w1", "rank", "programs"])
def heads_kernel(
    x_desc, w_desc, xa_desc, b0, b1, b2, q_out, k_out, v_out, cos_ptr, sin_ptr, m, n, k, w0, w1, rank, stride,
    programs, G: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    DEPTH: gl.constexpr = STAGES if G == 2 else STAGES_OF_THREE
    left = gl.allocate_shared_memory(x_desc.dtype, [G * DEPTH, 64, BK], x_desc.layout)
    right = gl.allocate_shared_memory(x_desc.dtype, [DEPTH, BN, BK], w_desc.layout)
    buffers = gl.allocate_shared_memory(q_out.dtype, [2 * G, 64, WIDTH], q_out.layout)
    full, empty = ring(DEPTH, G)
    outs = (q_out, k_out, v_out)
    bs = (b0, b1, b2)
    of_group = (left, right, full, empty, buffers, xa_desc, b0, outs, cos_ptr, sin_ptr, m, n, k, w0, w1, stride,
                programs)  # fmt: skip
    of_copy = (x_desc, w_desc, xa_desc, bs, left, right, full, empty, m, n, k, w0, w1, rank, programs)
    if G == 2:
        gl.warp_specialize(
            [
                (_group, (of_group, 0, G, DEPTH, R)),
                (_group, (of_group, 1, G, DEPTH, R)),
                (_copy, (of_copy, G, DEPTH, R)),
            ],
            [4, 1],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_group, (of_group, 0, G, DEPTH, R)),
                (_group, (of_group, 1, G, DEPTH, R)),
                (_group, (of_group, 2, G, DEPTH, R)),
                (_copy, (of_copy, G, DEPTH, R)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


def run(call: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """For operands that `heads.why_not` has nothing against."""
    x, rank = call.x, padded(call.rank)
    (m, k), n = x.shape, sum(call.widths)
    q, key, v = (x.new_empty(m, width) for width in call.widths)
    groups = groups_of(m, n, BN.value)
    count = min(triton.cdiv(m, 64 * groups) * triton.cdiv(n, BN.value), processors(x.device.index or 0))
    heads_kernel[(count,)](
        tiles_of(x, 64, BK.value), tiles_of(call.weight, BN.value, BK.value), tiles_of(call.xa, 64, rank),
        *[tiles_of(b, BN.value, rank) for b in call.bs],
        *[tiles_of(out, 64, WIDTH.value) for out in (q, key, v)], call.cos, call.sin,
        m, n, k, call.widths[0], call.widths[1], call.rank, call.cos.stride(0), count, G=groups, R=rank, num_warps=4,
    )  # fmt: skip
    return q, key, v
