"""4-bit weights times a few rows on the matrix units, the codes read as they lie: half a byte a weight.

Weights stand on the left of the product and rows on the right, yᵀ [outs, rows] = W xᵀ: the matrix units take 64 or 16
of what is on the left at a time and 8 of what is on the right. A byte holds the weights of columns 2i (its high half)
and 2i + 1: its halves are two products, with the even and with the odd columns of x, which `spread` lays side by side
first. A block of weights is multiplied as its codes' numbers in bf16, and its scale multiplies the sums.

Weights of few outputs are split along their columns; partial sums go through memory, and the last program of some
outputs to arrive adds them up in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.glu import glu_forward
from pronghorn.kernels.matvec import FourBit, RowNorm
from pronghorn.kernels.triton.glu import value_and_slope
from pronghorn.kernels.triton.launch import (
    dependent_launch,
    has_warpgroups,
    launch_next,
    processors_of,
    row_block,
    unit_rows,
    wait_for_last,
)
from pronghorn.kernels.triton.lora import dot

# Of four codes the low bytes of their bf16 numbers, then the high ones: each out of two registers of codes 0 to 7 and
# two of codes 8 to 15, and between the two by the code's highest bit (permutations read the low half of a selector).
# A byte's low half comes before its high half: the first and third number are of low halves, the others of high ones.
_TWO_BYTES = """
    prmt.b32 a, l0, l1, index;
    prmt.b32 b, l2, l3, index;
    prmt.b32 low, a, b, upper;
    prmt.b32 a, h0, h1, index;
    prmt.b32 b, h2, h3, index;
    prmt.b32 high, a, b, upper;
    prmt.b32 $%(highs)d, low, high, 0x7351;
    prmt.b32 $%(lows)d, low, high, 0x6240;
"""
_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,r")


@cache
def lookup(numbers: tuple[float, ...]) -> str:
    """Assembly that looks four bytes up in a table of 16: $0, $1 are the high halves' numbers, $2, $3 the low ones'.

    The table is part of it: with other operands than the codes it would not run on them where they lie.
    """
    raw = torch.tensor(numbers).bfloat16().view(torch.int16).tolist()
    planes = (bytes(number & 255 for number in raw), bytes((number >> 8) & 255 for number in raw))
    words = [int.from_bytes(plane[i : i + 4], "little") for plane in planes for i in range(0, 16, 4)]
    names = ("l0", "l1", "l2", "l3", "h0", "h1", "h2", "h3")
    table = "".join(f"mov.b32 {name}, {word:#010x};" for name, word in zip(names, words, strict=True))
    return (
        "{ .reg .b32 index, upper, a, b, low, high, l<4>, h<4>;\n"
        + table
        + "and.b32 index, $4, 0x77777777; shr.b32 upper, $4, 1;"
        + "lop3.b32 upper, upper, 0x44444444, 0x32103210, 0xEA;"
        + _TWO_BYTES % {"highs": 0, "lows": 2}
        + "shr.b32 index, index, 16; shr.b32 upper, upper, 16;"
        + _TWO_BYTES % {"highs": 1, "lows": 3}
        + "}"
    )


@triton.jit
def _spread(
    x_ptr, norm_ptr, out_ptr, width, x_stride, eps, offset, NORM: tl.constexpr, PAIRS: tl.constexpr,
    TOGETHER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row (without a norm, a part of one) with even columns in front of odd ones, both in the order of `_ordered`."""
    row = tl.program_id(0)
    place = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    half = width // 2
    known = place < half
    k = place % 32
    column = 2 * (place - k + k // TOGETHER % 4 * 8 + k // (4 * TOGETHER) * TOGETHER + k % TOGETHER)
    if NORM:
        even_scale = tl.load(norm_ptr + column, mask=known, other=0.0).to(tl.float32) + offset
        odd_scale = tl.load(norm_ptr + column + 1, mask=known, other=0.0).to(tl.float32) + offset
    if PDL:
        launch_next()
        wait_for_last()
    x_ptr += row * x_stride
    even = tl.load(x_ptr + column, mask=known, other=0.0).to(tl.float32)
    odd = tl.load(x_ptr + column + 1, mask=known, other=0.0).to(tl.float32)
    if NORM:
        rstd = 1.0 / tl.sqrt((tl.sum(even * even, 0) + tl.sum(odd * odd, 0)) / width + eps)
        even *= rstd * even_scale
        odd *= rstd * odd_scale
    out_ptr += row * width
    tl.store(out_ptr + place, even.to(out_ptr.dtype.element_ty), mask=known)
    tl.store(out_ptr + half + place, odd.to(out_ptr.dtype.element_ty), mask=known)


@triton.jit
def _ordered(codes, OUTS: tl.constexpr, BYTES: tl.constexpr, TOGETHER: tl.constexpr):
    """Bytes [OUTS, BYTES] in the order in which the eight bytes that a thread reads as one are what it holds of the
    left side of a product on the matrix units: the first TOGETHER of four threads, then their next ones."""
    threads = tl.reshape(codes, [OUTS, BYTES // 32, 4, 8 // TOGETHER, TOGETHER])
    return tl.reshape(tl.permute(threads, (0, 1, 3, 2, 4)), [OUTS, BYTES])


@triton.jit
def _numbers(codes, code_ptr, LOOKUP: tl.constexpr):
    """What the high and the low halves of bytes stand for, in bf16."""
    if LOOKUP != "":
        return tl.inline_asm_elementwise(
            LOOKUP, _REGISTERS, [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        whole = codes.to(tl.int32)
        return (
            tl.load(code_ptr + (whole >> 4)).to(tl.bfloat16),
            tl.load(code_ptr + (whole & 15)).to(tl.bfloat16),
        )


@triton.jit
def _scale_words(absmax_ptr, coarse_ptr, at, SIZE2: tl.constexpr, NESTED: tl.constexpr):
    """What the scales of four neighbouring blocks are made of: a word of codes and what it is scaled by."""
    if NESTED:
        return tl.load(absmax_ptr + at // 4), tl.load(coarse_ptr + at // SIZE2)
    else:
        return at, at


@triton.jit
def _scale(
    absmax_ptr, fine_ptr, word, coarse, shift, at, BLOCK: tl.constexpr, NESTED: tl.constexpr
):  # fmt: skip
    """The scales of the blocks `at` + BLOCK."""
    if NESTED:
        return tl.load(fine_ptr + ((word >> (8 * BLOCK)) & 255)) * coarse + shift
    else:
        return tl.load(absmax_ptr + at + BLOCK)


@triton.jit
def _products(
    packed_at, scale, even, odd, code_ptr, LOOKUP: tl.constexpr, OUTS: tl.constexpr, BYTES: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """A block's sums [OUTS, ROWS] times its scales."""
    codes = _ordered(tl.load(packed_at), OUTS, BYTES, TOGETHER)
    high, low = _numbers(codes, code_ptr, LOOKUP)
    # The interpreter, which has no table in registers, multiplies in fp32.
    WIDE: tl.constexpr = LOOKUP == ""
    return (dot(high, even, WIDE) + dot(low, odd, WIDE)) * scale[:, None]


@triton.jit
def _few_rows(
    x_ptr, code_ptr, packed0, packed1, packed2, absmax0, absmax1, absmax2, coarse0, coarse1, coarse2,
    shift0, shift1, shift2, fine0, fine1, fine2, bias_ptr, residual_ptr, out_ptr, partial_ptr, arrived_ptr,
    batch, outs, rows0, rows1, half, each, out_stride,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GLU: tl.constexpr, PARTS: tl.constexpr, NESTED: tl.constexpr,
    SIZE: tl.constexpr, SIZE2: tl.constexpr, LOOKUP: tl.constexpr, OUTS: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, TOGETHER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """outs: of the whole, or of gate. half: of a row's columns. each: blocks of a split."""
    BYTES: tl.constexpr = SIZE // 2
    tile, split = tl.program_id(0), tl.program_id(1)
    first = tile * OUTS
    packed_ptr, absmax_ptr, coarse_ptr, shift_ptr, fine_ptr = packed0, absmax0, coarse0, shift0, fine0
    begin = first * 0
    if PARTS > 1 and GLU == "":
        if first >= rows0:
            packed_ptr, absmax_ptr, coarse_ptr, shift_ptr, fine_ptr = packed1, absmax1, coarse1, shift1, fine1
            begin += rows0
        if PARTS > 2:  # noqa: SIM102  (one is known at compile time, the other is not)
            if first >= rows0 + rows1:
                packed_ptr, absmax_ptr, coarse_ptr = packed2, absmax2, coarse2
                shift_ptr, fine_ptr = shift2, fine2
                begin += rows1
    shift, shift_up = 0.0, 0.0
    if NESTED:
        shift = tl.load(shift_ptr)
        if GLU != "":
            shift_up = tl.load(shift1)
    n, m, byte = tl.arange(0, OUTS), tl.arange(0, ROWS), tl.arange(0, BYTES)
    own = first - begin + n
    blocks = half // BYTES
    codes_at = own[:, None] * half + byte[None, :]
    x_at = x_ptr + (m % batch)[None, :] * (2 * half) + byte[:, None]
    start = split * each
    end = tl.minimum(start + each, blocks)
    scales_at = own * blocks + start
    word, coarse = _scale_words(absmax_ptr, coarse_ptr, scales_at, SIZE2, NESTED)
    if GLU != "":
        word_up, coarse_up = _scale_words(absmax1, coarse1, scales_at, SIZE2, NESTED)
    if PDL:
        # The first of the weights are on their way before the rows are there.
        line = tl.arange(0, 2) * 128
        fetch((packed_ptr + own[:, None] * half + start * BYTES + line[None, :]).to(tl.int64))
        if GLU != "":
            fetch((packed1 + own[:, None] * half + start * BYTES + line[None, :]).to(tl.int64))
        launch_next()
        wait_for_last()
    sums = tl.zeros([OUTS, ROWS], tl.float32)
    sums_up = tl.zeros([OUTS, ROWS], tl.float32)
    for block in tl.range(start, end, 4, num_stages=STAGES):
        ahead = own * blocks + tl.minimum(block + 4, end - 4)
        next_word, next_coarse = _scale_words(absmax_ptr, coarse_ptr, ahead, SIZE2, NESTED)
        if GLU != "":
            next_word_up, next_coarse_up = _scale_words(absmax1, coarse1, ahead, SIZE2, NESTED)
        for i in tl.static_range(4):
            at = (block + i) * BYTES
            even = tl.load(x_at + at)
            odd = tl.load(x_at + half + at)
            scale = _scale(absmax_ptr, fine_ptr, word, coarse, shift, own * blocks + block, i, NESTED)
            sums += _products(
                packed_ptr + codes_at + at, scale, even, odd, code_ptr, LOOKUP, OUTS, BYTES, TOGETHER
            )
            if GLU != "":
                scale = _scale(absmax1, fine1, word_up, coarse_up, shift_up, own * blocks + block, i, NESTED)
                sums_up += _products(
                    packed1 + codes_at + at, scale, even, odd, code_ptr, LOOKUP, OUTS, BYTES, TOGETHER
                )
        word, coarse = next_word, next_coarse
        if GLU != "":
            word_up, coarse_up = next_word_up, next_coarse_up
    gather_splits(
        sums, sums_up, bias_ptr, residual_ptr, out_ptr, partial_ptr, arrived_ptr, batch, outs, out_stride,
        BIAS, RESIDUAL, GLU, OUTS, ROWS, SPLITS,
    )  # fmt: skip


@triton.jit
def fetch(at):
    """Ask for memory to be brought into the second cache, a line of 128 bytes an address."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def gather_splits(
    sums, sums_up, bias_ptr, residual_ptr, out_ptr, partial_ptr, arrived_ptr, batch, outs, out_stride,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GLU: tl.constexpr, OUTS: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Finish a program's outputs; of several with the same ones, the last to arrive does it for all of them."""
    tile, split = tl.program_id(0), tl.program_id(1)
    n, m = tl.arange(0, OUTS), tl.arange(0, ROWS)
    if SPLITS == 1:
        _finish(
            sums, sums_up, bias_ptr, residual_ptr, out_ptr, tile * OUTS + n, m, batch, outs, out_stride,
            BIAS, RESIDUAL, GLU,
        )  # fmt: skip
    else:
        # Partial sums [tiles, SPLITS, kinds, OUTS, ROWS].
        KINDS: tl.constexpr = 1 if GLU == "" else 2
        mine = n[:, None] * ROWS + m[None, :]
        to = partial_ptr + (tile * SPLITS + split) * (KINDS * OUTS * ROWS) + mine
        tl.store(to, sums)
        if GLU != "":
            tl.store(to + OUTS * ROWS, sums_up)
        tl.debug_barrier()
        before = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel")
        if before == SPLITS - 1:
            tl.debug_barrier()
            source = partial_ptr + tile * (SPLITS * KINDS * OUTS * ROWS) + mine
            total = tl.zeros([OUTS, ROWS], tl.float32)
            total_up = tl.zeros([OUTS, ROWS], tl.float32)
            # Read past the first cache, which knows nothing of what other processors have written.
            for _ in tl.static_range(SPLITS):
                total += tl.load(source, cache_modifier=".cg")
                if GLU != "":
                    total_up += tl.load(source + OUTS * ROWS, cache_modifier=".cg")
                source += KINDS * OUTS * ROWS
            _finish(
                total, total_up, bias_ptr, residual_ptr, out_ptr, tile * OUTS + n, m, batch, outs, out_stride,
                BIAS, RESIDUAL, GLU,
            )  # fmt: skip
            tl.store(arrived_ptr + tile, 0)


@triton.jit
def _finish(
    y, up, bias_ptr, residual_ptr, out_ptr, n, m, batch, outs, out_stride, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, GLU: tl.constexpr,
):  # fmt: skip
    """Bias, activation and residual of outputs n and rows m, and their place in memory."""
    if BIAS:
        y += tl.load(bias_ptr + n).to(tl.float32)[:, None]
    if GLU != "":
        if BIAS:
            up += tl.load(bias_ptr + outs + n).to(tl.float32)[:, None]
        value, _ = value_and_slope(y, GLU)
        y = value * up
    to = m[None, :] * out_stride + n[:, None]
    known = (m < batch)[None, :] & (n < outs)[:, None]
    if RESIDUAL:
        y += tl.load(residual_ptr + to, mask=known, other=0.0).to(tl.float32)
    tl.store(out_ptr + to, y.to(out_ptr.dtype.element_ty), mask=known)


class Config(NamedTuple):
    """Outputs of a program, parts of a row of weights, and how they are run."""

    outs: int
    splits: int
    warps: int = 4
    stages: int = 3

    def together(self, device: torch.device) -> int:
        """How many neighbouring columns of a product's left side a thread holds, where it comes from bytes."""
        return 2 if self.warps % 4 == 0 and self.outs % 64 == 0 and has_warpgroups(device) else 4


def config_of(outs: int, blocks: int, rows: int, processors: int) -> Config:
    """Three or four programs for every processor, none with fewer than two steps of four blocks.

    Measured on an H200 for gate and up of 8B: for 8 rows 57 µs with 3 parts of the columns and 75 with one, for 32 rows
    68 and 63.
    """
    wanted = round((4 if rows <= 16 else 3) * processors / (outs // 64))
    return Config(64, max(1, min(wanted, blocks // 8)), stages=3 if rows <= 32 else 2)


@cache
def arrived(device: torch.device, tiles: int) -> Tensor:
    """Counters of programs that have arrived, zero between launches."""
    return torch.zeros(tiles, dtype=torch.int32, device=device)


def spread(x: Tensor, norm: RowNorm | None, together: int) -> Tensor:
    """x [B, in], normalised, in bf16, its columns as `few_rows` reads them."""
    x = unit_rows(x)
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=torch.bfloat16, device=x.device)
    weight, eps, offset = (x, 0.0, 0.0) if norm is None else norm
    # Of a whole row's sum of squares one program is in charge.
    block, warps = row_block(width // 2) if norm is not None else (1024, 4)
    pdl = dependent_launch(x.device)
    _spread[(rows, triton.cdiv(width // 2, block))](
        x, weight, out, width, x.stride(0), eps, offset, NORM=norm is not None, PAIRS=block, TOGETHER=together,
        PDL=bool(pdl), num_warps=max(warps, 4), **pdl,
    )  # fmt: skip
    return out


def few_rows(
    x: Tensor,
    parts: Sequence[FourBit],
    norm: RowNorm | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """`matvec_4bit` of up to 64 rows, which `fits_few_rows`, without adapters."""
    batch, width = x.shape
    if activation is not None and batch > 32:  # sums of gate and up take more registers than there are
        y = few_rows(x, parts, norm, bias, None, None, out_dtype, config)
        gate, up = y.chunk(2, 1)
        return glu_forward(gate, up, activation)
    outs = sum(part.rows for part in parts)
    rows = max(16, triton.next_power_of_2(batch))
    outs = outs // 2 if activation is not None else outs
    out = residual if residual is not None else torch.empty(batch, outs, dtype=out_dtype, device=x.device)
    bits = [part.bits for part in (*parts, *[parts[-1]] * (3 - len(parts)))]
    nested = [part.second for part in bits]
    blocks = width // bits[0].blocksize
    config = config or config_of(outs, blocks, rows, processors_of(x.device))
    each = triton.cdiv(triton.cdiv(blocks, config.splits), 4) * 4
    splits, tiles = triton.cdiv(blocks, each), outs // config.outs
    kinds = 1 if activation is None else 2
    partial = torch.empty(
        splits * kinds * outs * rows if splits > 1 else 0, dtype=torch.float32, device=x.device
    )
    absmax = [b.absmax.view(-1) if b.nested is None else b.absmax.view(-1).view(torch.int32) for b in bits]
    pdl, together = dependent_launch(x.device), config.together(x.device)
    _few_rows[(tiles, splits)](
        spread(x, norm, together), bits[0].code,
        *(b.packed.view(-1) for b in bits), *absmax,
        *(n[1] for n in nested), *(n[2] for n in nested), *(n[0] for n in nested),
        out if bias is None else bias, out if residual is None else residual, out, partial,
        arrived(x.device, tiles), batch, outs, bits[0].shape[0], bits[1].shape[0], width // 2, each, out.stride(0),
        BIAS=bias is not None, RESIDUAL=residual is not None, GLU=activation or "", PARTS=len(parts),
        NESTED=bits[0].nested is not None, SIZE=bits[0].blocksize, SIZE2=nested[0][3],
        LOOKUP=lookup(parts[0].numbers) if x.is_cuda else "", OUTS=config.outs, ROWS=rows, SPLITS=splits,
        STAGES=config.stages, TOGETHER=together, PDL=bool(pdl), num_warps=config.warps, num_stages=config.stages, **pdl,
    )  # fmt: skip
    return out
