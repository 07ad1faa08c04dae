"""The short causal convolution in front of linear attention: a channel over a token and the few before it, then SiLU.

    z[t, c] = Σ_j w[c, W - 1 - j] x[t - j, c]   over j < W with token t - j in t's document;   y = silu(z)
    dz = dy · silu'(z);   dx[t] = Σ_j w[W - 1 - j] dz[t + j];   dw[W - 1 - j] = Σ_t dz[t] x[t - j]   over the same pairs

Only x is needed in backward: z is a few multiply-adds. Arithmetic is fp32 (fp64 for fp64 inputs), one rounding at the
end. C channels, W width of the convolution.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, math_dtype, use_triton


def short_conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, document: Tensor, *, impl: Impl | None = None
) -> Tensor:
    """y [T, C] of x [T, C] (rows may be part of a wider buffer's), weight [C, W], bias [C] and each token's document
    int32 [T]."""
    if use_triton(x, impl):
        from pronghorn.kernels.triton.short_conv import forward

        return forward(x, weight, bias, document)
    z = _summed(x, weight, bias, document)
    return (z * z.sigmoid()).to(x.dtype)


def short_conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    document: Tensor,
    *,
    need_weight_grad: bool = False,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx [T, C] contiguous, and fp32 gradients of weight and bias (None unless `need_weight_grad`)."""
    if use_triton(x, impl):
        from pronghorn.kernels.triton.short_conv import backward

        return backward(dy, x, weight, bias, document, need_weight_grad)
    z = _summed(x, weight, bias, document)
    gate = z.sigmoid()
    dz = dy.to(z.dtype) * gate * (1 + z * (1 - gate))
    taps, wide = weight.to(z.dtype), x.to(z.dtype)
    dx, dweight = torch.zeros_like(dz), torch.zeros_like(taps)
    for j, tap, same in _taps(weight.shape[1], document):
        reached = dz[j:] * same
        dx[: dx.shape[0] - j] += reached * taps[:, tap]
        if need_weight_grad:
            dweight[:, tap] = (reached * wide[: wide.shape[0] - j]).sum(0)
    dbias = dz.sum(0) if need_weight_grad and bias is not None else None
    return dx.to(x.dtype), dweight if need_weight_grad else None, dbias


def _summed(x: Tensor, weight: Tensor, bias: Tensor | None, document: Tensor) -> Tensor:
    """z [T, C] in fp32."""
    wide = x.to(math_dtype(x.dtype))
    taps, z = weight.to(wide.dtype), torch.zeros_like(wide)
    for j, tap, same in _taps(weight.shape[1], document):
        z[j:] += wide[: wide.shape[0] - j] * same * taps[:, tap]
    return z if bias is None else z + bias.to(z.dtype)


def _taps(width: int, document: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Distances j, their columns of the weight, and for t from j on whether t - j is of t's document [T - j, 1]."""
    tokens = document.shape[0]
    for j in range(min(width, tokens)):
        yield j, width - 1 - j, (document[j:] == document[: tokens - j])[:, None]
