"""Products in 16 bits that add the adapter's share, and a residual, themselves (`kernels.products`)."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.blocks import joining
from pronghorn.kernels import products
from pronghorn.kernels.lora import LowRank
from pronghorn.weights import Weight

#: Longest sum of an input gradient. In whole steps of 8B at the limit of the card's power (H200) those of o (4,096) and
#: of q, k, v (6,144) gain 2.2 ms together with the outputs, that of gate and up (28,672) loses 2.0: cuBLAS's product of
#: that shape draws less.
LONGEST_SUM = 8192


def output(
    weight: Weight, x: Tensor, share: LowRank | None, residual: Tensor | None, out: Tensor | None = None
) -> Tensor | None:
    """x Wᵀ + the adapter's share (+ residual) [T, out] by one launch, into `out` where that is given (it may be the
    residual); None where the matrix library makes it."""
    ready = _ready(weight, x.dtype)
    if ready is None:
        return None
    xa, b = None, None
    if share is not None:
        xa = share.xa if share.scaling == 1.0 else share.xa * share.scaling
        b = share.b.contiguous()
    product = products.Product(x, ready, True, xa, b, residual)
    return products.run(product, out) if products.why_not(product) is None else None


def takes_input_grad(weight: Weight, dy: Tensor, a: Tensor) -> bool:
    """Whether `input_grad` is to be called, for adapters A [ΣR, in]."""
    ready = _ready(weight, dy.dtype)
    if ready is None or a.dtype != dy.dtype or dy.shape[1] > LONGEST_SUM:
        return False
    # dXA is not there yet: a matrix as wide.
    like = torch.empty_strided((dy.shape[0], a.shape[0]), (a.shape[0], 1), dtype=dy.dtype, device="meta")
    return products.why_not(products.Product(dy, ready, False, like, a)) is None


def input_grad(weight: Weight, dy: Tensor, dxa: Tensor, a: Tensor) -> Tensor:
    """dy W + dXA A [T, in] by one launch."""
    ready = _ready(weight, dy.dtype)
    assert ready is not None
    return products.run(products.Product(dy, ready, False, dxa, a))


def _ready(weight: Weight, dtype: torch.dtype) -> Tensor | None:
    return weight.ready(dtype) if joining.ADAPTERS_IN_PRODUCTS else None
