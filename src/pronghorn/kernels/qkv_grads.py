"""Gradients of rotated q and k, and of v, as the gradients of the projections' outputs side by side.

    [dQ | dK | dV] = [Rᵀ dq | Rᵀ dk | dv]        [T, (N + 2 K) D]

The rotation's backward reads and writes dq and dk anyway. From columns of one matrix, one product with the stacked
weights [W_q; W_k; W_v] makes the input gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, use_triton
from pronghorn.kernels.fp8 import Fp8Rows, quantise_joined
from pronghorn.kernels.rope import qk_rope_backward


def unrotate_joined(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    pairs: bool = False,
    impl: Impl | None = None,
) -> list[Tensor]:
    """dQ [T, N·D], dK and dV [T, K·D] as columns of one new matrix, in this order.

    Args:
        dq: [T, N, D]. dk, dv: [T, K, D]. cos, sin: [T, Drot], and `pairs`, as for `qk_rope_forward`.
    """
    widths = [x.shape[1] * x.shape[2] for x in (dq, dk, dv)]
    if use_triton(dq, impl):
        from pronghorn.kernels.triton.qkv_grads import unrotate_joined as run

        return list(run(dq, dk, dv, cos, sin, pairs).split(widths, 1))
    dq, dk, _, _ = qk_rope_backward(dq, dk, cos, sin, pairs=pairs, impl="torch")
    return list(torch.cat([x.flatten(1) for x in (dq, dk, dv)], 1).split(widths, 1))


def unrotate_joined_fp8(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    columns: Tensor,
    *,
    pairs: bool = False,
    impl: Impl | None = None,
) -> tuple[list[Tensor], Fp8Rows]:
    """`unrotate_joined`, and the e4m3 codes [T, (N + 2 K) D] of the rounded matrix · columns with their scales [T, 1].

    Args:
        columns: factors of the matrix's columns, as for `kernels.fp8.quantise_rows`.
    """
    if use_triton(dq, impl) and cos.shape[-1] == dq.shape[-1] and not pairs:
        from pronghorn.kernels.triton.qkv_grads import unrotate_joined_fp8 as run

        wide, rows = run(dq, dk, dv, cos, sin, columns)
        return list(wide.split([x.shape[1] * x.shape[2] for x in (dq, dk, dv)], 1)), rows
    parts = unrotate_joined(dq, dk, dv, cos, sin, pairs=pairs, impl=impl)
    return parts, quantise_joined(parts, columns, impl=impl)
