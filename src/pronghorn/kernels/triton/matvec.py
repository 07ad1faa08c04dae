"""Weights times few rows in Triton.

One row: a program takes some outputs, multiplies elementwise and sums at the end; its first weights are asked for
before the kernel waits for the one before it (programmatic dependent launch), whose tail they hide. Up to 16 rows:
tiles of outputs on the matrix units, the rows padded to 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.matvec import MOST_ROWS, RowNorm, RowShare
from pronghorn.kernels.triton.glu import value_and_slope
from pronghorn.kernels.triton.launch import dependent_launch, launch_next, unit_rows, wait_for_last
from pronghorn.kernels.triton.lora import dot, is_wide

#: rows that the matrix units take at least
PADDED_ROWS = 16


@triton.jit
def own_share(xa_ptr, b_ptr, slots_ptr, batch, row, known, outs, end0, end1, parts_rank, R: tl.constexpr):
    """What row `batch`'s adapter adds to the outputs `row`, in fp32."""
    slot = tl.load(slots_ptr + batch)
    y = tl.zeros_like(row).to(tl.float32)
    if slot > 0:
        part = (row >= end0).to(tl.int32) + (row >= end1).to(tl.int32)
        r = tl.arange(0, R)[None, :]
        xa = tl.load(xa_ptr + batch * parts_rank + part[:, None] * R + r, mask=known[:, None], other=0.0)
        at = b_ptr + (slot.to(tl.int64) * outs + row)[:, None] * R + r
        y = tl.sum(tl.load(at, mask=known[:, None], other=0.0).to(tl.float32) * xa, 1)
    return y


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
    x_ptr, w0, w1, w2, norm_ptr, bias_ptr, residual_ptr, out_ptr, slots_ptr, xa_ptr, b_ptr,
    rows, rows0, rows1, width, x_stride, out_stride, table_stride, outs, end0, end1, parts_rank, eps, offset,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GLU: tl.constexpr, R: tl.constexpr,
    PARTS: tl.constexpr, OWN: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[b] of one row b a program column. OWN: every row has a weight of its own out of a table, none for slot 0."""
    batch = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    known = row < rows
    w_ptr, begin = part_of(tl.program_id(0) * ROWS, w0, w1, w2, rows0, rows1, PARTS if GLU == "" else 1)
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
    if PDL:
        launch_next()
        wait_for_last()
    x_ptr += batch * x_stride
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
        y += own_share(xa_ptr, b_ptr, slots_ptr, batch, row, known, outs, end0, end1, parts_rank, R)
    if GLU != "":
        up = tl.sum(other, 1) * rstd
        if BIAS:
            up += tl.load(bias_ptr + rows + row, mask=known, other=0.0).to(tl.float32)
        if R > 0:
            up += own_share(
                xa_ptr, b_ptr, slots_ptr, batch, rows + row, known, outs, end0, end1, parts_rank, R
            )
        value, _ = value_and_slope(y, GLU)
        y = value * up
    to = batch * out_stride + row
    if RESIDUAL:
        y += tl.load(residual_ptr + to, mask=known, other=0.0).to(tl.float32)
    tl.store(out_ptr + to, y.to(out_ptr.dtype.element_ty), mask=known)


@triton.jit
def _few_rows(
    x_ptr, w0, w1, w2, norm_ptr, bias_ptr, residual_ptr, out_ptr, slots_ptr, xa_ptr, b_ptr,
    rows, rows0, rows1, width, x_stride, out_stride, outs, end0, end1, parts_rank, batch, eps, offset,
    NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GLU: tl.constexpr, R: tl.constexpr,
    PARTS: tl.constexpr, WIDE: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b = tl.arange(0, BATCH)
    column = tl.arange(0, BLOCK)
    known, there = row < rows, b < batch
    w_ptr, begin = part_of(tl.program_id(0) * ROWS, w0, w1, w2, rows0, rows1, PARTS if GLU == "" else 1)
    at = w_ptr + (row - begin).to(tl.int64)[:, None] * width + column[None, :]
    second = w1 + row.to(tl.int64)[:, None] * width + column[None, :]
    from_x = x_ptr + b[:, None] * x_stride + column[None, :]
    if PDL:
        launch_next()
        wait_for_last()
    sums = tl.zeros([ROWS, BATCH], tl.float32)
    other = tl.zeros([ROWS, BATCH], tl.float32)
    square = tl.zeros([BATCH], tl.float32)
    for start in tl.range(0, width, BLOCK, num_stages=STAGES):
        inside = column < width - start
        mask = known[:, None] & inside[None, :]
        w = tl.load(at + start, mask=mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(from_x + start, mask=there[:, None] & inside[None, :], other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            square += tl.sum(wide * wide, 1)
            scale = tl.load(norm_ptr + start + column, mask=inside, other=0.0).to(tl.float32) + offset
            x = (wide * scale[None, :]).to(w.dtype)
        turned = tl.trans(x)
        sums += dot(w, turned, WIDE)
        if GLU != "":
            v = tl.load(second + start, mask=mask, other=0.0, eviction_policy="evict_first")
            other += dot(v, turned, WIDE)
    if NORM:
        rstd = 1.0 / tl.sqrt(square / width + eps)
        sums *= rstd[None, :]
        other *= rstd[None, :]
    if BIAS:
        sums += tl.load(bias_ptr + row, mask=known, other=0.0).to(tl.float32)[:, None]
    if GLU != "" and BIAS:
        other += tl.load(bias_ptr + rows + row, mask=known, other=0.0).to(tl.float32)[:, None]
    if R > 0:
        for i in range(batch):
            mine = (b == i)[None, :]
            y = own_share(xa_ptr, b_ptr, slots_ptr, i, row, known, outs, end0, end1, parts_rank, R)
            sums += tl.where(mine, y[:, None], 0.0)
            if GLU != "":
                y = own_share(xa_ptr, b_ptr, slots_ptr, i, rows + row, known, outs, end0, end1, parts_rank, R)
                other += tl.where(mine, y[:, None], 0.0)
    if GLU != "":
        value, _ = value_and_slope(sums, GLU)
        sums = value * other
    to = b[None, :] * out_stride + row[:, None]
    mask = known[:, None] & there[None, :]
    if RESIDUAL:
        sums += tl.load(residual_ptr + to, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + to, sums.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _up(
    y_ptr, slots_ptr, xa_ptr, b_ptr, y_stride, outs, end0, end1, parts_rank, R: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    batch = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = row < outs
    at = y_ptr + batch * y_stride + row
    y = tl.load(at, mask=known, other=0.0).to(tl.float32)
    y += own_share(xa_ptr, b_ptr, slots_ptr, batch, row, known, outs, end0, end1, parts_rank, R)
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=known)


def one_row_config(rows: int, width: int, glu: bool) -> dict[str, int]:
    """4 to 16 KB of weights a program and tile, and enough programs that every processor has some to wait for."""
    block = 1024 if width % 1024 == 0 or width > 8192 else 512
    tile = 2 if rows <= 2048 else 4 if rows <= 16384 else 8
    return {"ROWS": max(1, tile // 2) if glu else tile, "BLOCK": block, "num_warps": 4}


def few_rows_config(rows: int, glu: bool) -> dict[str, int]:
    """Tiles of 16 outputs where there are few, of 32 where there are many; four tiles on their way."""
    wide = rows >= 132 * 32 * 2 and not glu
    return {"ROWS": 32 if wide else 16, "BLOCK": 256, "STAGES": 4, "num_warps": 4}


def dense(
    x: Tensor,
    weights: Sequence[Tensor],
    norm: RowNorm | None,
    bias: Tensor | None,
    share: RowShare | None,
    residual: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    x = unit_rows(x)
    batch, width = x.shape
    if batch > MOST_ROWS or len(weights) > 3 or not all(weight.is_contiguous() for weight in weights):
        raise ValueError(f"{batch} rows, {len(weights)} weights, or one that is not contiguous")
    outs = sum(weight.shape[0] for weight in weights)
    rows = outs // 2 if activation is not None else outs
    if activation is not None and len(weights) == 1:
        weights = weights[0].split(rows)
    padded = [*weights, *[weights[-1]] * (3 - len(weights))]
    sizes = padded[0].shape[0], padded[1].shape[0]
    out = residual if residual is not None else torch.empty(batch, rows, dtype=out_dtype, device=x.device)
    pointers, numbers, kinds = arguments(x, norm, bias, share, residual, activation, out, outs)
    pdl = dependent_launch(x.device)
    if batch == 1:
        config = one_row_config(rows, width, activation is not None)
        _fit(config, weights, activation)
        whole = width % config["BLOCK"] == 0 and rows % config["ROWS"] == 0
        _one_row[(triton.cdiv(rows, config["ROWS"]), 1)](
            x, *padded, *pointers, rows, *sizes, width, x.stride(0), out.stride(0), 0, *numbers,
            **kinds, PARTS=len(weights), OWN=False, WHOLE=whole, PDL=bool(pdl), **config, **pdl,
        )  # fmt: skip
        return out
    config = few_rows_config(rows, activation is not None)
    _fit(config, weights, activation)
    _few_rows[(triton.cdiv(rows, config["ROWS"]),)](
        x, *padded, *pointers, rows, *sizes, width, x.stride(0), out.stride(0), *numbers[:-2], batch, *numbers[-2:],
        **kinds, PARTS=len(weights), WIDE=is_wide(x), BATCH=PADDED_ROWS, PDL=bool(pdl), **config, **pdl,
    )  # fmt: skip
    return out


def _fit(config: dict[str, int], weights: Sequence[Tensor], activation: str | None) -> None:
    """Fewer outputs a program where it would have some of two weights; all of a program's are of one."""
    apart = weights[:-1] if activation is None else ()
    while any(weight.shape[0] % config["ROWS"] for weight in apart):
        config["ROWS"] //= 2


def arguments(
    x: Tensor,
    norm: RowNorm | None,
    bias: Tensor | None,
    share: RowShare | None,
    residual: Tensor | None,
    activation: str | None,
    out: Tensor,
    outs: int,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...], dict[str, Any]]:
    """Pointers, numbers and kinds that the kernels here share; what is absent points to x."""
    ends = (outs, outs) if share is None else (*share.ends, outs, outs)[:2]
    pointers = (
        x if norm is None else norm.weight,
        x if bias is None else bias,
        x if residual is None else residual,
        out,
        x if share is None else share.slots,
        x if share is None else share.xa,
        x if share is None else share.b,
    )
    eps, offset = (0.0, 0.0) if norm is None else (norm.eps, norm.offset)
    parts_rank = 0 if share is None else share.xa.shape[1]
    kinds = {
        "NORM": norm is not None,
        "BIAS": bias is not None,
        "RESIDUAL": residual is not None,
        "GLU": activation or "",
        "R": 0 if share is None else share.b.shape[2],
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
    config = {"ROWS": 1 if batch == 1 else 4, "BLOCK": 1024 if width >= 1024 else 512, "num_warps": 4}
    whole = width % config["BLOCK"] == 0 and rows % config["ROWS"] == 0
    _one_row[(triton.cdiv(rows, config["ROWS"]), batch)](
        x, a, a, a, *pointers, rows, rows, rows, width, x.stride(0), out.stride(0), a.stride(0), *numbers,
        **kinds, PARTS=1, OWN=True, WHOLE=whole, PDL=bool(pdl), **config, **pdl,
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
