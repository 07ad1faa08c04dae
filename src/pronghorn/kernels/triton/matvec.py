"""A weight times one row in Triton, and the adapters of few rows.

A program takes some outputs, multiplies elementwise and sums at the end; its first weights are asked for before the
kernel waits for the one before it (programmatic dependent launch), whose tail they hide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.matvec import HANDED_COPIES, RowAdapter, RowNorm, RowShare
from pronghorn.kernels.triton.glu import value_and_slope
from pronghorn.kernels.triton.launch import dependent_launch, launch_next, unit_rows, wait_for_last


@triton.jit
def own_b(b_ptr, slots_ptr, batch, row, known, outs, R: tl.constexpr):
    """B of row `batch`'s adapter for the outputs `row`, [len(row), R]; zero where it has none."""
    slot = tl.load(slots_ptr + batch)
    at = b_ptr + (slot.to(tl.int64) * outs + row)[:, None] * R + tl.arange(0, R)[None, :]
    return tl.load(at, mask=(known & (slot + tl.zeros_like(row) > 0))[:, None], other=0.0)


@triton.jit
def share_of(b, xa_ptr, batch, row, known, end0, end1, parts_rank, R: tl.constexpr):
    """What that adapter adds to those outputs, in fp32."""
    part = (row >= end0).to(tl.int32) + (row >= end1).to(tl.int32)
    at = xa_ptr + batch * parts_rank + part[:, None] * R + tl.arange(0, R)[None, :]
    return tl.sum(tl.load(at, mask=known[:, None], other=0.0) * b.to(tl.float32), 1)


@triton.jit
def hand_on_xa(
    j, x_ptr, a_ptr, norm_ptr, slots_ptr, handed_ptr, turn, width, eps, offset, COUNT: tl.constexpr,
    COPIES: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Number j of norm(x) Aᵀ to all copies, in one word with the turn, so that it is read without any fence."""
    slot = tl.load(slots_ptr)
    column = tl.arange(0, BLOCK)
    at = a_ptr + (slot.to(tl.int64) * COUNT + j) * width + column
    a = tl.load(at, mask=column < width, other=0.0)
    if PDL:
        launch_next()
        wait_for_last()
    sums = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        inside = column < width - start
        x = tl.load(x_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            square += x * x
            x = x * (tl.load(norm_ptr + start + column, mask=inside, other=0.0).to(tl.float32) + offset)
        sums += a.to(tl.float32) * x
        a = tl.load(at + start + BLOCK, mask=column < width - start - BLOCK, other=0.0)
    xa = tl.sum(sums, 0)
    if NORM:
        xa = xa / tl.sqrt(tl.sum(square, 0) / width + eps)
    xa = tl.where(slot > 0, xa, 0.0)
    low = xa.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    copies = tl.arange(0, COPIES) * COUNT
    tl.store(handed_ptr + copies + j, ((turn.to(tl.int64) << 32) | low) + tl.zeros_like(copies))


@triton.jit
def handed_words(handed_ptr, row, known, end0, end1, R: tl.constexpr):
    """What lies now where `hand_on_xa` puts the numbers that those outputs take, [len(row), R]."""
    part = (row >= end0).to(tl.int32) + (row >= end1).to(tl.int32)
    at = handed_ptr + part[:, None] * R + tl.arange(0, R)[None, :]
    return tl.load(at, mask=known[:, None], other=0, volatile=True)


@triton.jit
def awaited_share(b, words, handed_ptr, turn, row, known, end0, end1, R: tl.constexpr):
    """`share_of` with the numbers of this turn: `words`, read before, where they were there already."""
    while tl.max(tl.max((known[:, None] & ((words >> 32) != turn)).to(tl.int32), 1), 0) > 0:
        words = handed_words(handed_ptr, row, known, end0, end1, R)
    return tl.sum(words.to(tl.int32).to(tl.float32, bitcast=True) * b.to(tl.float32), 1)


@triton.jit
def part_of(first, w0, w1, w2, rows0, rows1, PARTS: tl.constexpr):
    """The weight that a program's outputs belong to, which begin with `first`, and the first of that weight's."""
    w_ptr, begin = w0, first * 0
    if PARTS > 1:
        if first >= rows0:
            w_ptr = w1
            begin += rows0
        if PARTS > 2:  # noqa: SIM102  (one is known at compile time, the other is not)
            if first >= rows0 + rows1:
                w_ptr = w2
                begin += rows1
    return w_ptr, begin


@triton.jit
def _one_row(
    x_ptr, w0, w1, w2, norm_ptr, bias_ptr, residual_ptr, out_ptr, slots_ptr, xa_ptr, b_ptr, a_ptr, turn_ptr,
    rows, rows0, rows1, width, x_stride, out_stride, table_stride, outs, end0, end1, parts_rank, eps, offset,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GLU: tl.constexpr, R: tl.constexpr,
    INSIDE: tl.constexpr, COPIES: tl.constexpr, PARTS: tl.constexpr, OWN: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, A_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[b] of one row b a program column. OWN: every row has a weight of its own out of a table, none for slot 0.
    INSIDE: so many programs in front of the others multiply by A."""
    program = tl.program_id(0)
    if INSIDE > 0:
        turn = tl.load(turn_ptr)
        if program < INSIDE:
            hand_on_xa(
                program, x_ptr, a_ptr, norm_ptr, slots_ptr, xa_ptr, turn, width, eps, offset, INSIDE, COPIES,
                NORM, A_BLOCK, PDL,
            )  # fmt: skip
        else:
            _outputs(
                program - INSIDE, turn,
                x_ptr, w0, w1, w2, norm_ptr, bias_ptr, residual_ptr, out_ptr, slots_ptr,
                xa_ptr + program % COPIES * INSIDE, b_ptr,
                rows, rows0, rows1, width, x_stride, out_stride, table_stride, outs, end0, end1, parts_rank, eps,
                offset, NORM, BIAS, RESIDUAL, GLU, R, True, PARTS, OWN, WHOLE, ROWS, BLOCK, PDL,
            )  # fmt: skip
    else:
        _outputs(
            program, 0,
            x_ptr, w0, w1, w2, norm_ptr, bias_ptr, residual_ptr, out_ptr, slots_ptr, xa_ptr, b_ptr,
            rows, rows0, rows1, width, x_stride, out_stride, table_stride, outs, end0, end1, parts_rank, eps,
            offset, NORM, BIAS, RESIDUAL, GLU, R, False, PARTS, OWN, WHOLE, ROWS, BLOCK, PDL,
        )  # fmt: skip


@triton.jit
def _outputs(
    program, turn, x_ptr, w0, w1, w2, norm_ptr, bias_ptr, residual_ptr, out_ptr, slots_ptr, xa_ptr, b_ptr,
    rows, rows0, rows1, width, x_stride, out_stride, table_stride, outs, end0, end1, parts_rank, eps, offset,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GLU: tl.constexpr, R: tl.constexpr,
    AWAITED: tl.constexpr, PARTS: tl.constexpr, OWN: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some outputs of a program that multiplies by the weight."""
    batch = tl.program_id(1)
    row = program * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    known = row < rows
    w_ptr, begin = part_of(program * ROWS, w0, w1, w2, rows0, rows1, PARTS if GLU == "" else 1)
    if OWN:
        slot = tl.load(slots_ptr + batch)
        w_ptr += slot.to(tl.int64) * table_stride
    at = w_ptr + (row - begin).to(tl.int64)[:, None] * width + column[None, :]
    here = known[:, None] & (column < width)[None, :]
    if WHOLE:
        w = tl.load(at, eviction_policy="evict_first")
    else:
        w = tl.load(at, mask=here, other=0.0, eviction_policy="evict_first")
    if GLU != "":
        second = w1 + row.to(tl.int64)[:, None] * width + column[None, :]
        if WHOLE:
            v = tl.load(second, eviction_policy="evict_first")
        else:
            v = tl.load(second, mask=here, other=0.0, eviction_policy="evict_first")
        other = tl.zeros([ROWS, BLOCK], tl.float32)
    if R > 0:
        b = own_b(b_ptr, slots_ptr, batch, row, known, outs, R)
        if GLU != "":
            b_up = own_b(b_ptr, slots_ptr, batch, rows + row, known, outs, R)
    if PDL:
        launch_next()
        wait_for_last()
    x_ptr += batch * x_stride
    if AWAITED:
        # Programs that begin late find them here, and need not wait for memory in the end.
        handed = handed_words(xa_ptr, row, known, end0, end1, R)
        if GLU != "":
            handed_up = handed_words(xa_ptr, rows + row, known, end0, end1, R)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        inside = column < width - start
        x = tl.load(x_ptr + start + column, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            square += x * x
            x = x * (tl.load(norm_ptr + start + column, mask=inside, other=0.0).to(tl.float32) + offset)
        # The next tile is on its way while this one is multiplied.
        ahead = (column < width - start - BLOCK)[None, :] & known[:, None]
        sums += w.to(tl.float32) * x[None, :]
        w = tl.load(at + start + BLOCK, mask=ahead, other=0.0, eviction_policy="evict_first")
        if GLU != "":
            other += v.to(tl.float32) * x[None, :]
            v = tl.load(second + start + BLOCK, mask=ahead, other=0.0, eviction_policy="evict_first")
    y = tl.sum(sums, 1)
    rstd = 1.0
    if NORM:
        rstd = 1.0 / tl.sqrt(tl.sum(square, 0) / width + eps)
    y = y * rstd
    if OWN:
        y = tl.where(slot > 0, y, 0.0)
    if BIAS:
        y += tl.load(bias_ptr + row, mask=known, other=0.0).to(tl.float32)
    if R > 0:
        if AWAITED:
            y += awaited_share(b, handed, xa_ptr, turn, row, known, end0, end1, R)
        else:
            y += share_of(b, xa_ptr, batch, row, known, end0, end1, parts_rank, R)
    if GLU != "":
        up = tl.sum(other, 1) * rstd
        if BIAS:
            up += tl.load(bias_ptr + rows + row, mask=known, other=0.0).to(tl.float32)
        if R > 0:
            if AWAITED:
                up += awaited_share(b_up, handed_up, xa_ptr, turn, rows + row, known, end0, end1, R)
            else:
                up += share_of(b_up, xa_ptr, batch, rows + row, known, end0, end1, parts_rank, R)
        value, _ = value_and_slope(y, GLU)
        y = value * up
    to = batch * out_stride + row
    if RESIDUAL:
        y += tl.load(residual_ptr + to, mask=known, other=0.0).to(tl.float32)
    tl.store(out_ptr + to, y.to(out_ptr.dtype.element_ty), mask=known)


@triton.jit
def _up(
    y_ptr, slots_ptr, xa_ptr, b_ptr, y_stride, outs, end0, end1, parts_rank, R: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    batch = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = row < outs
    at = y_ptr + batch * y_stride + row
    y = tl.load(at, mask=known, other=0.0).to(tl.float32)
    b = own_b(b_ptr, slots_ptr, batch, row, known, outs, R)
    y += share_of(b, xa_ptr, batch, row, known, end0, end1, parts_rank, R)
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=known)


def one_row_config(rows: int, width: int, glu: bool) -> dict[str, int]:
    """4 KB of weights a program and tile; of few outputs 8 to 16 KB, so that what all ask for keeps memory busy.

    Measured on an H200: 60 µs for gate and up of 8B (3.9 TB/s) where tiles of 2 by 1,024 took 66.
    """
    block = 512 if rows > 2048 else 1024 if width <= 2048 else 2048
    return {"ROWS": 8 if glu else 4, "BLOCK": block, "num_warps": 4}


def down_config(width: int) -> dict[str, int]:
    """A whole row of A at a time, up to 16,384 numbers: all of it is on its way before x is there."""
    block = min(max(triton.next_power_of_2(width), 512), 16384)
    return {"ROWS": 1, "BLOCK": block, "num_warps": max(block // 1024, 4)}


def dense(
    x: Tensor,
    weights: Sequence[Tensor],
    norm: RowNorm | None,
    bias: Tensor | None,
    share: RowShare | RowAdapter | None,
    residual: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    x = unit_rows(x)
    batch, width = x.shape
    if batch != 1 or len(weights) > 3 or not all(weight.is_contiguous() for weight in weights):
        raise ValueError(f"{batch} rows, {len(weights)} weights, or one that is not contiguous")
    outs = sum(weight.shape[0] for weight in weights)
    rows = outs // 2 if activation is not None else outs
    if activation is not None and len(weights) == 1:
        weights = weights[0].split(rows)
    padded = [*weights, *[weights[-1]] * (3 - len(weights))]
    sizes = padded[0].shape[0], padded[1].shape[0]
    out = residual if residual is not None else torch.empty(1, rows, dtype=out_dtype, device=x.device)
    pointers, numbers, kinds = arguments(x, norm, bias, share, residual, activation, out, outs)
    pdl, config = dependent_launch(x.device), one_row_config(rows, width, activation is not None)
    # All of a program's outputs are of one weight.
    while activation is None and any(weight.shape[0] % config["ROWS"] for weight in weights[:-1]):
        config["ROWS"] //= 2
    whole = width % config["BLOCK"] == 0 and rows % config["ROWS"] == 0
    _one_row[(kinds["INSIDE"] + triton.cdiv(rows, config["ROWS"]), 1)](
        x, *padded, *pointers, rows, *sizes, width, x.stride(0), out.stride(0), 0, *numbers,
        **kinds, PARTS=len(weights), OWN=False, WHOLE=whole,
        A_BLOCK=a_block(width, config["num_warps"]), PDL=bool(pdl), **config, **pdl,
    )  # fmt: skip
    return out


def a_block(width: int, warps: int) -> int:
    """What a program has of a row of A at a time."""
    return min(triton.next_power_of_2(width), 1024 * warps)


def arguments(
    x: Tensor,
    norm: RowNorm | None,
    bias: Tensor | None,
    share: RowShare | RowAdapter | None,
    residual: Tensor | None,
    activation: str | None,
    out: Tensor,
    outs: int,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...], dict[str, Any]]:
    """Pointers, numbers and kinds that the kernels here share; what is absent points to x."""
    ends = (outs, outs) if share is None else (*share.ends, outs, outs)[:2]
    xa, a, turn = x, x, x
    if isinstance(share, RowAdapter):
        xa, a, turn = share.handed, share.a, share.turn
    elif share is not None:
        xa = share.xa
    pointers = (
        x if norm is None else norm.weight,
        x if bias is None else bias,
        x if residual is None else residual,
        out,
        x if share is None else share.slots,
        xa,
        x if share is None else share.b,
        a,
        turn,
    )
    eps, offset = (0.0, 0.0) if norm is None else (norm.eps, norm.offset)
    parts_rank = 0 if share is None else xa.shape[-1]
    kinds = {
        "NORM": norm is not None,
        "BIAS": bias is not None,
        "RESIDUAL": residual is not None,
        "GLU": activation or "",
        "R": 0 if share is None else share.b.shape[2],
        "INSIDE": xa.shape[1] if isinstance(share, RowAdapter) else 0,
        "COPIES": HANDED_COPIES,
    }
    return pointers, (outs, *ends, parts_rank, eps, offset), kinds


def down(x: Tensor, a: Tensor, slots: Tensor, norm: RowNorm | None) -> Tensor:
    x = unit_rows(x)
    batch, width = x.shape
    rows = a.shape[1]
    out = torch.empty(batch, rows, dtype=torch.float32, device=x.device)
    pointers, numbers, kinds = arguments(x, norm, None, None, None, None, out, rows)
    pointers = (*pointers[:4], slots, *pointers[5:])
    pdl = dependent_launch(x.device)
    config = down_config(width)
    whole = width % config["BLOCK"] == 0 and rows % config["ROWS"] == 0
    _one_row[(triton.cdiv(rows, config["ROWS"]), batch)](
        x, a, a, a, *pointers, rows, rows, rows, width, x.stride(0), out.stride(0), a.stride(0), *numbers,
        **kinds, PARTS=1, OWN=True, WHOLE=whole, A_BLOCK=1, PDL=bool(pdl), **config, **pdl,
    )  # fmt: skip
    return out


def up_(y: Tensor, share: RowShare) -> Tensor:
    outs, rank = share.b.shape[1:]
    ends = (*share.ends, outs, outs)[:2]
    _up[(triton.cdiv(outs, 256), y.shape[0])](
        y, share.slots, share.xa, share.b, y.stride(0), outs, *ends, share.xa.shape[1], R=rank, ROWS=256,
        num_warps=4,
    )  # fmt: skip
    return y
