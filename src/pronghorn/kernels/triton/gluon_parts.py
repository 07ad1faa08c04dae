"""What kernels written in Gluon share, and names that releases of Triton have changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_gl: Any = gl
_tma: Any = tma
_shared: Any = gl.shared_memory_descriptor
#: memory of a program seen as other numbers
view = getattr(_shared, "_reinterpret", None) or _shared.reinterpret
#: the copy engine brings a tile into shared memory, or takes it from there
fetch = getattr(_tma, "async_load", None) or _tma.async_copy_global_to_shared
put_back = getattr(_tma, "async_store", None) or _tma.async_copy_shared_to_global
#: all threads that run this code wait for each other
barrier = getattr(_gl, "thread_barrier", None) or _gl.barrier


@gluon.jit
def launch_next():
    """As in `launch`."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_for_last():
    """As in `launch`."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def activated(gate, up, KIND: gl.constexpr):
    """f(gate) · up in fp32; tanh(u) is 2 σ(2u) - 1."""
    if KIND == "silu":
        return gate / (1.0 + gl.exp(-gate)) * up
    elif KIND == "gelu":
        return 0.5 * gate * (1.0 + gl.erf(gate * 0.7071067811865476)) * up
    else:
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + gl.exp(-inner)) * up


@gluon.jit
def place(index, tiles_m, tiles_n, GROUP: gl.constexpr):
    """Number of a tile's row and column, in the order that keeps neighbours in time close in both: GROUP rows of tiles
    are gone through together."""
    group = index // (GROUP * tiles_n)
    first = group * GROUP
    height = gl.minimum(tiles_m - first, GROUP)
    inside = index - group * (GROUP * tiles_n)
    return first + inside % height, inside // height


@gluon.jit
def dealt(rows, across, programs, rest, TOGETHER: gl.constexpr):
    """Of this program by `tiles.Order`: how many tiles it has in whole groups of rows, how many in all, and its turn
    among the programs that take the rows left over, where those begin that have a tile less."""
    whole = rows // TOGETHER * TOGETHER * across
    turn = (gl.program_id(0) + programs - whole % programs) % programs
    own = (whole - gl.program_id(0) + programs - 1) // programs
    left = rows * across - whole
    more = (gl.maximum(left - turn, 0) + rest - 1) // rest
    return own, own + gl.where(turn < rest, more, 0), turn


@gluon.jit
def nth_tile(i, own, turn, rows, across, programs, rest, TOGETHER: gl.constexpr):
    """Number of row and column of this program's i-th tile."""
    begin = rows // TOGETHER * TOGETHER
    late = i >= own
    index = gl.where(late, turn + (i - own) * rest, gl.program_id(0) + i * programs)
    height = gl.where(late, gl.maximum(rows - begin, 1), TOGETHER)
    first = gl.where(late, begin, index // (TOGETHER * across) * TOGETHER)
    inside = index - gl.where(late, 0, first * across)
    return first + inside % height, inside // height


@gluon.jit
def slab_of(i, own, count, turn, at, rows, across, programs, period, rest, TOGETHER: gl.constexpr):
    """Where a sum over tiles of a row is written, and whether it is to be written after the i-th tile, in column `at`:
    a program that stays in its row adds the next tile first."""
    height = gl.maximum(rows - rows // TOGETHER * TOGETHER, 1)
    late = i >= own
    index = gl.program_id(0) + i * programs
    leaves = (i + 1 == own) | ((index + programs) // (TOGETHER * across) != index // (TOGETHER * across))
    stays = gl.where(late, rest % height == 0, period > 0)
    slab = gl.where(stays, gl.where(late, turn // height, at % gl.maximum(period, 1)), at)
    return slab, (not stays) | gl.where(late, i + 1 == count, leaves)


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The ring's next stage, and the phase of its barriers."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def ring(STAGES: gl.constexpr, READERS: gl.constexpr):
    """Barriers of a ring's stages: what is there, and what all of so many readers have given back."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=READERS)
    return full, empty


@gluon.jit
def _of_stage(right, stage, TURN: gl.constexpr):
    if TURN:
        return right.index(stage).permute((1, 0))
    else:
        return right.index(stage)


@gluon.jit
def multiplied(
    left, right, full, empty, narrow_left, narrow_right, stage, phase, steps, g: gl.constexpr, G: gl.constexpr,
    STAGES: gl.constexpr, NARROW: gl.constexpr, TURN: gl.constexpr,
):  # fmt: skip
    """64 rows of a tile of the product in fp32, for group g of G, by so many steps of the ring, the first of which may
    be narrow; TURN: the right side lies by columns.

    Three groups leave a thread 160 registers, and the compiler takes no instruction whose results alone are 128 then.
    """
    columns: gl.constexpr = right.shape[1] if TURN else right.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns if G == 2 else 128, 16])
    mbarrier.wait(full.index(stage), phase)
    acc = warpgroup_mma_init(gl.zeros([64, columns], gl.float32, layout))
    if NARROW:
        acc = warpgroup_mma(narrow_left, narrow_right, acc, use_acc=False, is_async=True)
    else:
        acc = warpgroup_mma(
            left.index(G * stage + g), _of_stage(right, stage, TURN), acc, use_acc=False, is_async=True
        )
    before = stage
    stage, phase = next_stage(stage, phase, STAGES)
    for _ in range(1, steps):
        mbarrier.wait(full.index(stage), phase)
        acc = warpgroup_mma(left.index(G * stage + g), _of_stage(right, stage, TURN), acc, is_async=True)
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(acc,)))
        mbarrier.arrive(empty.index(before), count=1)
        before = stage
        stage, phase = next_stage(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(before), count=1)
    return acc, stage, phase


@gluon.jit
def begin_behind(full, steps, g: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr):
    """A group begins a part of the ring behind the one before, and stays there: one finishes while others multiply."""
    LAG: gl.constexpr = STAGES - 1 if G == 2 else g
    if g > 0:
        mbarrier.wait(full.index(LAG), 0, pred=steps > LAG)


@gluon.jit
def bring(
    left_desc, right_desc, narrow_left, narrow_right, left, right, full, empty, at_m, at_n, k, stage, phase,
    G: gl.constexpr, STAGES: gl.constexpr, R: gl.constexpr, TURN: gl.constexpr,
):  # fmt: skip
    """What G groups multiply for a tile: the narrow step of rank R, if it has one, and all others. What lies beside
    or below a matrix is read as zero: ranks need not fill the step."""
    BK: gl.constexpr = left.shape[2]
    BN: gl.constexpr = right.shape[1] if TURN else right.shape[2]
    if R:
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(bar, (64 * G + BN) * R * 2)
        for g in gl.static_range(G):
            fetch(narrow_left, [at_m + 64 * g, 0], bar,
                  view(left.index(G * stage + g), narrow_left.dtype, [64, R], narrow_left.layout))  # fmt: skip
        if TURN:
            fetch(narrow_right, [at_n, 0], bar,
                  view(right.index(stage), narrow_right.dtype, [BN, R], narrow_right.layout))  # fmt: skip
        else:
            fetch(narrow_right, [0, at_n], bar,
                  view(right.index(stage), narrow_right.dtype, [R, BN], narrow_right.layout))  # fmt: skip
        stage, phase = next_stage(stage, phase, STAGES)
    for step in range(gl.cdiv(k, BK)):
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(bar, (64 * G + BN) * BK * 2)
        for g in gl.static_range(G):
            fetch(left_desc, [at_m + 64 * g, step * BK], bar, left.index(G * stage + g))
        if TURN:
            fetch(right_desc, [at_n, step * BK], bar, right.index(stage))
        else:
            fetch(right_desc, [step * BK, at_n], bar, right.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def pass_over(full, empty, stage, phase, count: gl.constexpr, STAGES: gl.constexpr):
    """Stages of other groups."""
    for _ in gl.static_range(count):
        mbarrier.wait(full.index(stage), phase)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def put_ready(x, buffers, turn: gl.constexpr):
    """A tile where the copy engine may take it. Two buffers take turns, by the number of the write: the one before last
    has been read."""
    tma.store_wait(1)
    buffer = buffers.index(turn)
    buffer.store(x)
    fence_async_shared()
    return buffer


@gluon.jit
def put(out_desc, at_m, at_n, x, buffers, turn: gl.constexpr):
    """A tile to memory."""
    put_back(out_desc, [at_m, at_n], put_ready(x, buffers, turn))


@gluon.jit
def halves(acc):
    """acc cut into two side by side; no number moves between threads."""
    rows: gl.constexpr = acc.shape[0]
    half: gl.constexpr = acc.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(acc, [rows, 2, half]), (0, 2, 1)))


@gluon.jit
def quarters(acc):
    """acc cut into four side by side; no number moves between threads."""
    first, second = halves(acc)
    a, b = halves(first)
    c, d = halves(second)
    return a, b, c, d


def tiles_of(x: Tensor, rows: int, columns: int) -> Any:
    """What the copy engine needs to know of a matrix whose tiles it brings."""
    bits = 8 * x.element_size()
    layout = gl.NVMMASharedLayout(min(128, columns * bits // 8), bits, 2)
    return TensorDescriptor.from_tensor(x, [rows, columns], layout)


@gluon.jit
def _sigmoid(x):
    """σ(x) by the two approximate instructions alone, 2 ulp each, without care for what underflows."""
    e = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;",
        "=f,f",
        [x * -1.4426950408889634],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def value_and_slope(x, KIND: gl.constexpr):
    """f(x) and f'(x) in fp32; see `kernels.glu` for the formulas."""
    if KIND == "silu":
        s = _sigmoid(x)
        value = x * s
        slope = s + value * (1.0 - s)
    elif KIND == "gelu":
        cdf = 0.5 * (1.0 + gl.erf(x * 0.7071067811865476))
        value = x * cdf
        slope = cdf + x * 0.3989422804014327 * gl.exp(-0.5 * x * x)
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # tanh z = 2 σ(2z) - 1
        t = 2.0 * _sigmoid(2.0 * inner) - 1.0
        half = 0.5 * (1.0 + t)
        value = x * half
        slope = half + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return value, slope
