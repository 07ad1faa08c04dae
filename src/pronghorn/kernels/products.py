"""Products of tall matrices in 16 bits with an adapter's share and a residual inside, in one launch.

    out = x Wᵀ + XA Bᵀ + residual        (turned)
    dx  = dy W + dXA A

Sums in fp32, rounded once. On Hopper's matrix units (`triton/gemm_hopper.py`); the formulas in torch are the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pronghorn.kernels import tiles
from pronghorn.kernels.dispatch import Impl, math_dtype

#: largest rank that one step of the product takes
MOST_RANK = 64
#: least share of the tiles' columns that are the result's
LEAST_FULL = 0.8


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
        return 0 if self.xa is None else tiles.padded(self.xa.shape[1])


def why_not(x: Tensor, weight: Tensor, turned: bool, rank: int = 0, *others: Tensor | None) -> str | None:
    """Why the kernel does not take a product of x with an adapter of this rank, or not well; None: it does. `others`:
    what else is read or written, b, the residual, where the result goes."""
    reason = tiles.why_not(x.device, x.dtype)
    if reason is not None:
        return reason
    rows, columns = x.shape[0], weight.shape[0 if turned else 1]
    if rank > MOST_RANK:
        return f"an adapter of rank {rank}, of which one step takes {MOST_RANK}"
    # XA and the result are matrices of their own.
    if any(width * x.element_size() % 16 for width in (rank, columns)) or not tiles.aligned(
        x, weight, *others
    ):
        return "rows that do not begin at multiples of 16 bytes"
    return None if fits(rows, columns) else "tiles that leave processors idle or are mostly empty"


def fits(rows: int, columns: int) -> bool:
    """Whether a result of these sizes is cut into tiles that are full enough, and enough of them."""
    full = columns >= LEAST_FULL * tiles.COLUMNS * -(-columns // tiles.COLUMNS)
    return full and tiles.fills(rows, columns, tiles.COLUMNS)


def multiply(product: Product, out: Tensor | None = None, *, impl: Impl | None = None) -> Tensor:
    """The product [M, N], into `out` where that is given (it may be the residual)."""
    out = product.x.new_empty(product.shape) if out is None else out
    if tiles.on_hopper(product.x, impl):
        from pronghorn.kernels.triton.gemm_hopper import run

        run(product, out)
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
