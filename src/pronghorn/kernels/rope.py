"""Rotary position embedding, with an optional per-head RMSNorm before it (Su et al. 2021, arXiv 2104.09864).

Rotate-half convention: with x = [x₁, x₂, rest] split at half the rotated width,

    y = [x₁ c₁ - x₂ s₁,  x₂ c₂ + x₁ s₂,  rest]

which is linear in x, so that its backward is the transpose. Some families turn neighbouring elements in place of halves
(`pairs`): x₁ are then the even elements, x₂ the odd ones. Element i takes the angle at column i of cos and sin either
way. Qwen3 normalises each head of q and k first.
Arithmetic is fp32 (fp64 for fp64 inputs), one rounding at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, math_dtype, use_triton
from pronghorn.kernels.lora import LowRank


def qk_rope_forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    inplace: bool = False,
    pairs: bool = False,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k, in one launch.

    Args:
        q: [T, N, D]. k: [T, K, D]. Rows (the first dimension) may be strided views into a wider buffer.
        cos, sin: [T, Drot] with Drot ≤ D; head elements from Drot on pass unrotated.
        q_norm_weight, k_norm_weight: [D] of the per-head RMSNorm, both or neither.
        inplace: write over q and k; only without norm weights, whose inputs backward needs.
        pairs: neighbouring elements are turned, not halves.
    """
    if (q_norm_weight is None) != (k_norm_weight is None):
        raise ValueError("give both norm weights or neither")
    if inplace and q_norm_weight is not None:
        raise ValueError("in place only without norm weights: backward needs the inputs")
    if use_triton(q, impl):
        from pronghorn.kernels.triton.rope import forward

        return forward(q, k, cos, sin, q_norm_weight, k_norm_weight, eps, weight_offset, inplace, pairs)
    outputs = []
    for x, weight in ((q, q_norm_weight), (k, k_norm_weight)):
        wide = x.to(math_dtype(x.dtype))
        if weight is not None:
            rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            wide = wide * rstd * (weight.to(wide.dtype) + weight_offset)
        rotated = rotate(wide, cos, sin, pairs)
        outputs.append(x.copy_(rotated) if inplace else rotated.to(x.dtype))
    return outputs[0], outputs[1]


def adapted_rope_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    adapters: tuple[LowRank | None, LowRank | None, LowRank | None],
    *,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
    pairs: bool = False,
    impl: Impl | None = None,
) -> None:
    """Add to q, k and v what their adapters lack and rotate q and k, in place and in one launch.

    The sum and the rotation are fp32, so there is one rounding, where adding first and rotating then has two.

    Args:
        q: [T, N, D]. k, v: [T, K, D]. cos, sin: as for `qk_rope_forward`. adapters: of q, k and v, with b [N·D, R].
        into: write there instead of in place.
    """
    if use_triton(q, impl):
        from pronghorn.kernels.triton.rope import adapted_rope_ as triton_adapted

        triton_adapted(q, k, v, cos, sin, adapters, into, pairs)
        return
    outs = into or (q, k, v)
    for x, out, adapter, rotates in zip((q, k, v), outs, adapters, (True, True, False), strict=True):
        base = x.reshape(x.shape[0], -1)
        wide = base.to(math_dtype(x.dtype)) if adapter is None else adapter.add_to(base)
        wide = wide.view(x.shape)
        out.copy_(rotate(wide, cos, sin, pairs) if rotates else wide)


def qk_rope_backward(
    dq: Tensor,
    dk: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q: Tensor | None = None,
    k: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    need_weight_grad: bool = False,
    inplace: bool = False,
    pairs: bool = False,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Transpose of `qk_rope_forward`; q and k are its inputs and needed only with norm weights.

    Returns:
        Gradients of q and k, and fp32 gradients [D] of the norm weights (None unless `need_weight_grad`).
    """
    if use_triton(dq, impl):
        from pronghorn.kernels.triton.rope import backward

        norm = None if q_norm_weight is None else (q, k, q_norm_weight, k_norm_weight, eps, weight_offset)
        return backward(dq, dk, cos, sin, norm, need_weight_grad, inplace, pairs)
    grads: list[Tensor] = []
    weight_grads: list[Tensor | None] = []
    for dy, x, weight in ((dq, q, q_norm_weight), (dk, k, k_norm_weight)):
        grad = _rotate_back(dy.to(math_dtype(dy.dtype)), cos, sin, pairs)
        weight_grad = None
        if weight is not None:
            assert x is not None, "the norm's backward needs its input"
            grad, weight_grad = _head_norm_backward(grad, x, weight, eps, weight_offset)
        grads.append(dy.copy_(grad) if inplace else grad.to(dy.dtype))
        weight_grads.append(weight_grad if need_weight_grad else None)
    return grads[0], grads[1], weight_grads[0], weight_grads[1]


def _halves(x: Tensor, width: int, pairs: bool) -> tuple[Tensor, Tensor]:
    """Views of the elements of x [..., D] that turn together, among the first `width`."""
    if pairs:
        return x[..., 0:width:2], x[..., 1:width:2]
    return x[..., : width // 2], x[..., width // 2 : width]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool = False) -> Tensor:
    """x [T, N, D] rotated by cos, sin [T, Drot], in x's dtype."""
    width = cos.shape[-1]
    c1, c2 = _halves(cos[:, None].to(x.dtype), width, pairs)
    s1, s2 = _halves(sin[:, None].to(x.dtype), width, pairs)
    first, second = _halves(x, width, pairs)
    y = x.clone()
    to_first, to_second = _halves(y, width, pairs)
    to_first[:] = first * c1 - second * s1
    to_second[:] = second * c2 + first * s2
    return y


def _rotate_back(dy: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    """The transpose of `rotate`."""
    width = cos.shape[-1]
    c1, c2 = _halves(cos[:, None].to(dy.dtype), width, pairs)
    s1, s2 = _halves(sin[:, None].to(dy.dtype), width, pairs)
    first, second = _halves(dy, width, pairs)
    dx = dy.clone()
    to_first, to_second = _halves(dx, width, pairs)
    to_first[:] = first * c1 + second * s2
    to_second[:] = second * c2 - first * s1
    return dx


def _head_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    """Backward of the per-head RMSNorm: (dx [T, N, D], dweight [D]) in grad's dtype."""
    wide = x.to(grad.dtype)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * rstd
    dweight = (grad * normed).sum((0, 1))
    scaled = grad * (weight.to(grad.dtype) + weight_offset)
    along = (scaled * normed).mean(-1, keepdim=True)
    return (scaled - normed * along) * rstd, dweight
