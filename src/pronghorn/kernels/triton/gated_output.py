"""Gated outputs in Triton, a few heads a program: see `kernels.gated_output`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: elements of a tile
TILE = 2048


@triton.jit
def _normed(out, weight_ptr, column, known, width, eps, NORM: tl.constexpr):
    """out / rms, 1 / rms and the weight; without a norm out and ones."""
    rstd = tl.full([out.shape[0], 1], 1.0, tl.float32)
    weight = tl.full([1, out.shape[1]], 1.0, tl.float32)
    if NORM:
        rstd = tl.rsqrt(tl.sum(out * out, 1) / width + eps)[:, None]
        weight = tl.load(weight_ptr + column, mask=known, other=0.0).to(tl.float32)[None, :]
    return out * rstd, rstd, weight


@triton.jit
def _forward(
    out_ptr, gate_ptr, weight_ptr, y_ptr, rows, width, eps,
    NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    known = column < width
    at = row[:, None].to(tl.int64) * width + column[None, :]
    inside = (row < rows)[:, None] & known[None, :]
    out = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    normed, _, weight = _normed(out, weight_ptr, column, known, width, eps, NORM)
    opened = tl.sigmoid(gate)
    if NORM:
        opened = gate * opened
    tl.store(y_ptr + at, (normed * weight * opened).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy_ptr, out_ptr, gate_ptr, weight_ptr, dout_ptr, dgate_ptr, dweight_ptr, rows, width, eps,
    NORM: tl.constexpr, WEIGHTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    known = column < width
    at = row[:, None].to(tl.int64) * width + column[None, :]
    inside = (row < rows)[:, None] & known[None, :]
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    normed, rstd, weight = _normed(out, weight_ptr, column, known, width, eps, NORM)
    opened = tl.sigmoid(gate)
    slope = opened * (1.0 - opened)
    if NORM:
        slope = opened * (1.0 + gate * (1.0 - opened))
        opened = gate * opened
    tl.store(dgate_ptr + at, (dy * normed * weight * slope).to(dgate_ptr.dtype.element_ty), mask=inside)
    dnormed = dy * opened
    dout = dnormed
    if NORM:
        along = dnormed * weight
        dout = rstd * (along - normed * (tl.sum(along * normed, 1) / width)[:, None])
    tl.store(dout_ptr + at, dout.to(dout_ptr.dtype.element_ty), mask=inside)
    if WEIGHTS:
        share = tl.sum(tl.where(inside, dnormed * normed, 0.0), 0)
        tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * width + column, share, mask=known)


def _launch(out: Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows, programs and sizes of tiles."""
    rows, width = out.shape[0] * out.shape[1], out.shape[2]
    block = triton.next_power_of_2(width)
    sizes = {"ROWS": max(1, TILE // block), "BLOCK": block, "num_warps": 4}
    return rows, triton.cdiv(rows, sizes["ROWS"]), sizes


def forward(out: Tensor, gate: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    assert out.is_contiguous() and gate.is_contiguous()
    y = torch.empty_like(out)
    rows, programs, sizes = _launch(out)
    _forward[(programs,)](
        out,
        gate,
        out if weight is None else weight,
        y,
        rows,
        out.shape[2],
        eps,
        NORM=weight is not None,
        **sizes,
    )
    return y


def backward(
    dy: Tensor, out: Tensor, gate: Tensor, weight: Tensor | None, eps: float, need_weight_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    assert dy.is_contiguous() and out.is_contiguous() and gate.is_contiguous()
    dout, dgate = torch.empty_like(out), torch.empty_like(gate)
    rows, programs, sizes = _launch(out)
    wants = need_weight_grad and weight is not None
    shares = out.new_empty(programs if wants else 0, out.shape[2], dtype=torch.float32)
    _backward[(programs,)](
        dy, out, gate, out if weight is None else weight, dout, dgate, shares, rows, out.shape[2], eps,
        NORM=weight is not None, WEIGHTS=wants, **sizes,
    )  # fmt: skip
    return dout, dgate, shares.sum(0) if wants else None
