"""Rows of tokens to rows of experts, and back: a token has k rows, one for each expert that it goes to.

    spread   y[s] = x[token(s)]                      x [T, H] -> [S, H], S = T · k
    gather   out[t] = (residual[t] +) Σ_j y[place(t, j)]      y [S, H] -> [T, H]

Each is the other's gradient. Sums are made in fp32 in the order of j, so they come out the same every time.
"""

from __future__ import annotations

from torch import Tensor

from pronghorn.kernels.dispatch import Impl, math_dtype, row_block, use_triton


def spread_rows(x: Tensor, tokens: Tensor) -> Tensor:
    """x [T, H], tokens [S] -> [S, H]."""
    return x.index_select(0, tokens)


def gather_rows(
    y: Tensor, places: Tensor, residual: Tensor | None = None, *, impl: Impl | None = None
) -> Tensor:
    """y [S, H], places [T, k] -> [T, H] in the dtype of the residual [T, H], else of y; one rounding."""
    if use_triton(y, impl):
        from pronghorn.kernels.triton.grouped_rows import gather

        return gather(y, places, residual)
    wide = math_dtype(y.dtype)
    out = y.new_empty(places.shape[0], y.shape[1], dtype=y.dtype if residual is None else residual.dtype)
    rows = row_block(y)
    for at in (slice(start, start + rows) for start in range(0, places.shape[0], rows)):
        total = y[places[at]].to(wide).sum(1)
        out[at] = total if residual is None else total + residual[at]
    return out
