"""The heads of latent attention (DeepSeek-V2, arXiv 2405.04434) out of what its projections give.

    q[n] = [q_nope[n] | R q_rope[n]],   k[n] = [k_nope[n] | R k_rope],   v[n]

k_nope and v come from the latent code, a pair a head; k_rope is one for all heads. R turns neighbouring elements
(`pairs`) or the halves of q_rope and k_rope: which of the two is the checkpoint's. With pairs Transformers' V3 also
moves the elements of both to halves, which no product q·k sees; here they stay.
Arithmetic is fp32 (fp64 for fp64 inputs), one rounding at the end. E nope, P rope, F size of v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, math_dtype, use_triton


def latent_heads_forward(
    q: Tensor | None,
    pair: Tensor,
    shared: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    nope: int,
    pairs: bool,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate q in place, and make k [T, N, E + P] and v [T, N, F].

    Args:
        q: [T, N, E + P], contiguous; None where it is rotated already.
        pair: [T, N, E + F] k_nope and v, contiguous.
        shared: [T, P] k_rope; rows may be part of a wider buffer's.
        cos, sin: [T, P / 2], each angle once; rows may be part of a wider buffer's.
    """
    (tokens, heads, wide), width = pair.shape, shared.shape[1]
    k = pair.new_empty(tokens, heads, nope + width)
    v = pair.new_empty(tokens, heads, wide - nope)
    if use_triton(pair, impl):
        from pronghorn.kernels.triton.latent_heads import forward

        forward(q, pair, shared, cos, sin, k, v, pairs)
        return k, v
    if q is not None:
        q[..., nope:] = rotate(q[..., nope:], cos[:, None], sin[:, None], pairs)
    k[..., :nope], v[:] = pair[..., :nope], pair[..., nope:]
    k[..., nope:] = rotate(shared, cos, sin, pairs)[:, None]
    return k, v


def latent_heads_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    pairs: bool,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Transpose of `latent_heads_forward`: dq in place, and the gradients of `pair` and of `shared`.

    Args:
        dq, dk: [T, N, E + P], contiguous. dv: [T, N, F]; heads may be part of wider ones.
    """
    width = 2 * cos.shape[1]
    nope = dq.shape[2] - width
    dpair = dv.new_empty(*dv.shape[:2], nope + dv.shape[2])
    if use_triton(dq, impl):
        from pronghorn.kernels.triton.latent_heads import backward

        return dpair, backward(dq, dk, dv, cos, sin, dpair, pairs)
    dq[..., nope:] = rotate(dq[..., nope:], cos[:, None], -sin[:, None], pairs)
    dpair[..., :nope], dpair[..., nope:] = dk[..., :nope], dv
    of_shared = dk[..., nope:].to(math_dtype(dk.dtype)).sum(1)
    return dpair, rotate(of_shared, cos, -sin, pairs).to(dk.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    """x [..., P] turned by cos, sin [..., P / 2], in x's dtype."""
    wide = x.to(math_dtype(x.dtype))
    c, s = cos.to(wide.dtype), sin.to(wide.dtype)
    first, second = (wide[..., 0::2], wide[..., 1::2]) if pairs else wide.chunk(2, -1)
    turned = (first * c - second * s, second * c + first * s)
    return (torch.stack(turned, -1).flatten(-2) if pairs else torch.cat(turned, -1)).to(x.dtype)
