"""What lies between a loss over some rows of a stream and the stream: gradients scaled, and put back to their rows.

scaled      out = gradient · scale
put_back    out[rows[i]] = gradient[i], and zero where no row was taken
"""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, use_triton


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, *, impl: Impl | None = None) -> Tensor:
    """gradient · scale (fp32, one element) in `dtype`, rounded once: a scale without dimensions would be rounded to 16
    bits first."""
    out = torch.empty_like(gradient, dtype=dtype)
    plain = gradient.dtype != torch.float64 and gradient.is_contiguous()
    if plain and use_triton(gradient, impl):
        from pronghorn.kernels.triton.loss_rows import scale as triton_scale

        triton_scale(gradient, scale, out)
        return out
    return torch.mul(gradient, scale.view((1,) * gradient.dim()), out=out)


def put_back(gradient: Tensor, rows: Tensor, length: int, *, impl: Impl | None = None) -> Tensor:
    """gradient [n, H] of rows [n] -> [length, H]. A row that comes several times is a filler: all its gradients are
    zero, so that it makes no difference which of them is taken."""
    if use_triton(gradient, impl):
        from pronghorn.kernels.triton.loss_rows import put_back as triton_put_back

        return triton_put_back(gradient, rows, length)
    return gradient.new_zeros(length, gradient.shape[1]).index_copy_(0, rows, gradient)
