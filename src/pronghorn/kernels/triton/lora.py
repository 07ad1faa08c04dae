"""Low-rank products of the forward pass in Triton: up and down.

A launch takes up to three adapters (q, k, v), told apart by the program's number. Launch configurations are pure
functions of shape and hardware.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.triton.launch import unit_rows

#: tl.dot takes no side below this
LEAST_RANK = 16


@triton.jit
def dot(a, b, WIDE: tl.constexpr):
    """a @ b summed in fp32; WIDE: with fp32 factors (also in the interpreter, where 16-bit products fail)."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def share(
    xa_ptr, b_ptr, scaling, rank, xa_stride, b_stride, rank_stride, start, row, column, known_row, known_column,
    R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """scaling · xa bᵀ of a tile in fp32; rank 0: nothing. b_stride is between outputs, rank_stride between ranks."""
    r = tl.arange(0, R)
    known_rank = r < rank
    xa = tl.load(
        xa_ptr + start * xa_stride + row[:, None] * xa_stride + r[None, :],
        mask=known_row[:, None] & known_rank[None, :], other=0.0,
    )  # fmt: skip
    b = tl.load(
        b_ptr + column[:, None] * b_stride + r[None, :] * rank_stride,
        mask=known_column[:, None] & known_rank[None, :], other=0.0,
    )  # fmt: skip
    return dot(xa, tl.trans(b), WIDE) * scaling


def is_wide(x: Tensor) -> bool:
    return x.dtype == torch.float32 or not x.is_cuda


def rank_block(ranks: Sequence[int]) -> int:
    return max(triton.next_power_of_2(max(ranks)), LEAST_RANK)


# --- up: Y = base + s XA Bᵀ ------------------------------------------------------------------------------------


@triton.jit
def _up(
    xa0, xa1, xa2, b0, b1, b2, base0, base1, base2, out0, out1, out2, addend_ptr, addend2_ptr,
    s0, s1, s2, r0, r1, r2, w0, w1, w2,
    base_stride0, base_stride1, base_stride2, out_stride0, out_stride1, out_stride2,
    b_stride0, b_stride1, b_stride2, blocks0, blocks1, tokens, xa_stride, rank_stride, addend_stride, addend2_stride,
    BASE: tl.constexpr, ADDENDS: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    zero = block * 0  # makes tensors of numbers that may be constants, so that the branches agree
    xa_ptr, b_ptr, base_ptr, out_ptr, scaling = xa0, b0, base0, out0, zero + s0
    rank, width, base_stride, out_stride = zero + r0, zero + w0, zero + base_stride0, zero + out_stride0
    b_stride = zero + b_stride0
    if block >= blocks0 + blocks1:
        xa_ptr, b_ptr, base_ptr, out_ptr, scaling = xa2, b2, base2, out2, zero + s2
        rank, width, base_stride, out_stride = zero + r2, zero + w2, zero + base_stride2, zero + out_stride2
        b_stride = zero + b_stride2
        block = block - (blocks0 + blocks1)
    elif block >= blocks0:
        xa_ptr, b_ptr, base_ptr, out_ptr, scaling = xa1, b1, base1, out1, zero + s1
        rank, width, base_stride, out_stride = zero + r1, zero + w1, zero + base_stride1, zero + out_stride1
        b_stride = zero + b_stride1
        block = block - blocks0
    start = tl.program_id(1).to(tl.int64) * BT
    row, column = tl.arange(0, BT), block * BO + tl.arange(0, BO)
    known_row, known_column = row < tokens - start, column < width
    y = share(
        xa_ptr, b_ptr, scaling, rank, xa_stride, b_stride, rank_stride, start, row, column, known_row, known_column,
        R, WIDE,
    )  # fmt: skip
    inside = known_row[:, None] & known_column[None, :]
    if BASE == 1:
        y += tl.load(base_ptr + column, mask=known_column, other=0.0).to(tl.float32)[None, :]
    if BASE == 2:
        at = base_ptr + start * base_stride + row[:, None] * base_stride + column[None, :]
        y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if ADDENDS > 0:
        at = addend_ptr + start * addend_stride + row[:, None] * addend_stride + column[None, :]
        y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if ADDENDS > 1:
        at = addend2_ptr + start * addend2_stride + row[:, None] * addend2_stride + column[None, :]
        y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    to = out_ptr + start * out_stride + row[:, None] * out_stride + column[None, :]
    tl.store(to, y.to(out_ptr.dtype.element_ty), mask=inside)


def up_config(tokens: int, rank: int) -> dict[str, int]:
    """Tiles of 64 tokens by 128 outputs: whole cache lines, 64 fp32 sums a thread; fewer tokens where few are left."""
    return {"BT": 64 if tokens > 32 else 16, "BO": 128 if rank <= 64 else 64, "num_warps": 4}


def up(
    xa: Tensor,
    bs: Sequence[Tensor],
    scalings: Sequence[float],
    bases: Sequence[Tensor | None],
    addends: Sequence[Tensor],
    inplace: bool,
) -> list[Tensor]:
    if inplace and any(base is None or base.dim() != 2 or base.stride(1) != 1 for base in bases):
        raise ValueError("in place needs bases that are matrices with rows of unit stride")
    kinds = {0 if base is None else base.dim() for base in bases}
    if len(kinds) > 1:  # a bias here and none there
        bases = [
            xa.new_zeros(b.shape[0]) if base is None else base for base, b in zip(bases, bs, strict=True)
        ]
        kinds = {1} if all(base is not None and base.dim() == 1 for base in bases) else kinds
        if len(kinds) > 1:
            raise ValueError("bases must be alike: all matrices, or all biases")
    (kind,) = kinds
    xa, tokens = unit_rows(xa), xa.shape[0]
    bases = [base if base is None else unit_rows(base) for base in bases]
    dtype = addends[0].dtype if addends else xa.dtype
    outs = [
        base
        if inplace and base is not None
        else torch.empty(tokens, b.shape[0], dtype=dtype, device=xa.device)
        for base, b in zip(bases, bs, strict=True)
    ]
    if not tokens:
        return outs
    ranks, widths = [b.shape[1] for b in bs], [b.shape[0] for b in bs]
    config = up_config(tokens, rank_block(ranks))
    blocks = [triton.cdiv(width, config["BO"]) for width in widths]
    held = [out if base is None else base for base, out in zip(bases, outs, strict=True)]
    others = [unit_rows(addend) for addend in addends] + [xa, xa]
    if len({b.stride(1) for b in bs}) > 1 or any(1 not in b.stride() for b in bs):
        bs = [b.contiguous() for b in bs]
    _up[(sum(blocks), triton.cdiv(tokens, config["BT"]))](
        *three(list(xa.split(ranks, 1))), *three(list(bs)), *three(held), *three(outs), *others[:2],
        *three([float(s) for s in scalings]), *three(ranks), *three(widths), *three([base.stride(0) for base in held]),
        *three([out.stride(0) for out in outs]), *three([b.stride(0) for b in bs]), *three(blocks)[:2],
        tokens, xa.stride(0), bs[0].stride(1), others[0].stride(0), others[1].stride(0),
        BASE=kind, ADDENDS=len(addends), R=rank_block(ranks), WIDE=is_wide(xa), **config,
    )  # fmt: skip
    return outs


def three(parts: list[Any]) -> list[Any]:
    """Arguments of three parts; the missing ones repeat the first and no program takes them."""
    return parts + [parts[0]] * (3 - len(parts))


# --- down: XA = X Aᵀ ---------------------------------------------------------------------------------------------


@triton.jit
def _down(
    x_ptr, a_ptr, out_ptr, tokens, width, rank, x_stride, a_stride,
    R: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BT
    row, r, inner = tl.arange(0, BT), tl.arange(0, R), tl.arange(0, BK)
    known_row, known_rank = row < tokens - start, r < rank
    x_row = x_ptr + start * x_stride + row[:, None] * x_stride
    a_row = a_ptr + r[:, None] * a_stride
    total = tl.zeros([BT, R], dtype=tl.float32)
    for k in range(0, width, BK):
        column = k + inner
        known = column[None, :] < width
        x = tl.load(x_row + column[None, :], mask=known_row[:, None] & known, other=0.0)
        a = tl.load(a_row + column[None, :], mask=known_rank[:, None] & known, other=0.0)
        total += dot(x, tl.trans(a), WIDE)
    to = out_ptr + start * rank + row[:, None] * rank + r[None, :]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=known_row[:, None] & known_rank[None, :])


@cache
def down_config(tokens: int, rank: int, element: int, sms: int, shared: int) -> dict[str, int]:
    """As many tokens a program as still leave a program for every processor, as long an inner block as fits."""
    block, inner = 16, 256
    while block < 64 and triton.cdiv(tokens, 2 * block) * 10 >= sms * 9:
        block *= 2
    while inner > 32 and 3 * (block + rank) * inner * element > shared - 16 * 1024:
        inner //= 2
    return {"BT": block, "BK": inner, "num_warps": 4, "num_stages": 3}


def down(x: Tensor, a: Tensor) -> Tensor:
    x, a = unit_rows(x), unit_rows(a)
    (tokens, width), rank = x.shape, a.shape[0]
    out = torch.empty(tokens, rank, dtype=x.dtype, device=x.device)
    padded = rank_block([rank])
    config = down_config(tokens, padded, x.element_size(), *limits(x.device))
    if tokens:
        _down[(triton.cdiv(tokens, config["BT"]),)](
            x, a, out, tokens, width, rank, x.stride(0), a.stride(0), R=padded, WIDE=is_wide(x), **config
        )
    return out


@cache
def _limits(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def limits(device: torch.device) -> tuple[int, int]:
    """(processors, bytes of shared memory a program can have); small numbers for the interpreter."""
    return _limits(device.index or 0) if device.type == "cuda" else (2, 64 * 1024)
