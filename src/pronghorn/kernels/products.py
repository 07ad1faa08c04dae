"""Products of tall matrices in 16 bits with an adapter's share and a residual inside, in one launch.

    out = x Wᵀ + XA Bᵀ + residual        (turned)
    dx  = dy W + dXA A

Sums in fp32, rounded once. On Hopper's matrix units (`triton/gemm_hopper.py`); the formulas in torch are the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, math_dtype, use_triton
from pronghorn.kernels.glu_products import COLUMNS, aligned, fills, padded
from pronghorn.kernels.glu_products import ROWS as ROWS
from pronghorn.kernels.glu_products import why_not as why_not_here

#: largest rank that one step of the product takes
MOST_RANK = 64


@dataclass(frozen=True)
class Product:
    """x [M, K]; weight [N, K] where `turned`, else [K, N]; xa [M, R], scaled, with b [N, R] or [R, N]; residual
    [M, N]."""

    x: Tensor
    weight: Tensor
    turned: bool
    xa: Tensor | None = None
    b: Tensor | None = None
    residual: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the result."""
        return self.x.shape[0], self.weight.shape[0 if self.turned else 1]

    @property
    def padded_rank(self) -> int:
        """What the matrix units take of the adapter; 0 without one."""
        return 0 if self.xa is None else padded(self.xa.shape[1])


def why_not(product: Product) -> str | None:
    """Why the kernel does not take a product, or not well; None: it does."""
    reason = why_not_here(product.x.device, product.x.dtype)
    if reason is not None:
        return reason
    if product.xa is not None and product.xa.shape[1] > MOST_RANK:
        return f"an adapter of rank {product.xa.shape[1]}, of which one step takes {MOST_RANK}"
    if not aligned(product.x, product.weight, product.xa, product.b, product.residual):
        return "rows that do not begin at multiples of 16 bytes"
    return None if fills(*product.shape, COLUMNS) else "tiles that leave processors idle"


def run(product: Product, out: Tensor | None = None, *, impl: Impl | None = None) -> Tensor:
    """The product [M, N], into `out` where that is given (it may be the residual)."""
    out = product.x.new_empty(product.shape) if out is None else out
    if use_triton(product.x, impl):
        from pronghorn.kernels.triton.gemm_hopper import run as run_hopper

        run_hopper(product, out)
        return out
    dtype = math_dtype(product.x.dtype)
    weight = product.weight.to(dtype)
    y = product.x.to(dtype) @ (weight.t() if product.turned else weight)
    if product.xa is not None and product.b is not None:
        b = product.b.to(dtype)
        y = torch.addmm(y, product.xa.to(dtype), b.t() if product.turned else b)
    if product.residual is not None:
        y = y + product.residual.to(dtype)
    return out.copy_(y)
