"""One token more of each sequence through linear attention: the short convolution and the gated delta rule with what
they remember, in place.

    x_0 … x_{W-2} = memory;   y = silu(Σ_j w_j x_j + w_{W-1} x);   memory ← x_1 … x_{W-2}, x
    S ← exp(g) S;   S ← S + β k̂ (v - Sᵀ k̂)ᵀ;   out = Sᵀ q̂;   read = w · out / rms(out) · silu(z)

with g and β of `kernels.delta_gates`, k̂ and q̂ of `kernels.delta_rule`, the norm and its gate of `kernels.gated_output`.
A row's memory and state lie at the slot that a tensor on the device names, so a recorded step serves any sequences;
several rows may share a slot only where nobody asks what they give. Each is one launch on a GPU. Arithmetic is fp32
(fp64 for fp64 inputs); out is rounded once, behind the norm.

B rows, C = 2 K·D + N·F channels, W width of the convolution, K heads of q and k of D, N of v of F.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pronghorn.kernels.delta_gates import delta_gates_forward
from pronghorn.kernels.delta_rule import unit
from pronghorn.kernels.dispatch import Impl, math_dtype, use_triton
from pronghorn.kernels.gated_output import gated_output_forward


def short_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, memory: Tensor, slots: Tensor, *, impl: Impl | None = None
) -> Tensor:
    """y [B, C] of x [B, C] (rows may be part of a wider buffer's), weight [C, W], bias [C] and memory
    [slots, W - 1, C]."""
    if use_triton(x, impl):
        from pronghorn.kernels.triton.delta_step import conv

        return conv(x, weight, bias, memory, slots)
    at = slots.long()
    seen = torch.cat([memory[at], x[:, None].to(memory.dtype)], 1)
    memory[at] = seen[:, 1:]
    wide = math_dtype(x.dtype)
    z = (seen.to(wide) * weight.t().to(wide)).sum(1)
    z = z if bias is None else z + bias.to(wide)
    return (z * z.sigmoid()).to(x.dtype)


@dataclass(frozen=True)
class DeltaWeights:
    """What the gates and the norm of the output are made with: decay (A_log) and dt_bias [N], the norm's weight [F]."""

    decay: Tensor
    dt_bias: Tensor
    norm: Tensor
    eps: float


def delta_rule_step(
    qkv: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    weights: DeltaWeights,
    states: Tensor,
    slots: Tensor,
    *,
    impl: Impl | None = None,
) -> Tensor:
    """read [B, N·F] of what the convolution gave, qkv [B, C], and of z [B, N·F], b and a [B, N].

    Args:
        z, b, a: elements contiguous; rows may be part of a wider buffer's.
        states: [slots, N, D, F] contiguous, fp32 (fp64 for fp64 inputs). slots: [B] of each row.
    """
    _, heads, of_k, of_v = states.shape
    fits = all(16 <= size <= 256 and size & (size - 1) == 0 for size in (of_k, of_v))
    if fits and use_triton(qkv, impl):
        from pronghorn.kernels.triton.delta_step import rule

        return rule(qkv, z, b, a, weights, states, slots)
    at, wide, rows = slots.long(), states.dtype, qkv.shape[0]
    width = (qkv.shape[1] - heads * of_v) // 2
    q, k, v = qkv.split([width, width, heads * of_v], 1)
    group = heads * of_k // width
    q, k = (unit(x.view(rows, -1, of_k).to(wide)).repeat_interleave(group, 1) for x in (q, k))
    g, beta = delta_gates_forward(a, b, weights.decay, weights.dt_bias)
    state = states[at] * g.to(wide).exp()[..., None, None]
    known = (state * k[..., None]).sum(2)
    change = beta.to(wide)[..., None] * (v.view(rows, heads, of_v).to(wide) - known)
    state += k[..., None] * change[:, :, None]
    states[at] = state
    out = (state * (q * of_k**-0.5)[..., None]).sum(2)
    gate = z.reshape(out.shape).to(wide)
    read = gated_output_forward(out, gate, weight=weights.norm, eps=weights.eps, impl="torch")
    return read.flatten(1).to(qkv.dtype)
