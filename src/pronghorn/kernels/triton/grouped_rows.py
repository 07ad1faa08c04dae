"""A token's rows added up, in Triton: see `kernels.grouped_rows`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.triton.launch import unit_rows

BLOCK = 1024


@triton.jit
def _gather(
    y_ptr, places_ptr, residual_ptr, out_ptr, width, y_stride, residual_stride,
    K: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = column < width
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(K):
        place = tl.load(places_ptr + token * K + j).to(tl.int64)
        total += tl.load(y_ptr + place * y_stride + column, mask=known, other=0.0).to(tl.float32)
    if RESIDUAL:
        at = residual_ptr + token.to(tl.int64) * residual_stride + column
        total += tl.load(at, mask=known, other=0.0).to(tl.float32)
    to = out_ptr + token.to(tl.int64) * width + column
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=known)


def gather(y: Tensor, places: Tensor, residual: Tensor | None) -> Tensor:
    y = unit_rows(y)
    dtype = y.dtype if residual is None else residual.dtype
    tokens, width = places.shape[0], y.shape[1]
    out = torch.empty(tokens, width, dtype=dtype, device=y.device)
    added = y if residual is None else unit_rows(residual)
    if out.numel():
        _gather[(tokens, triton.cdiv(width, BLOCK))](
            y, places.contiguous(), added, out, width, y.stride(0), added.stride(0),
            K=places.shape[1], RESIDUAL=residual is not None, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out
