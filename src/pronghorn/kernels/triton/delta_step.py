"""One token more of linear attention in Triton: see `kernels.delta_step`.

A head's state goes through the registers of one program, 64 KB where q, k and v have 128 elements: it is read and
written once, and nothing else of a step is as large.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.delta_rule import EPS
from pronghorn.kernels.delta_step import DeltaWeights

#: channels of a program of the convolution
CHANNELS = 256
#: elements of a state that a warp holds
ELEMENTS_OF_WARP = 2048


@triton.jit
def _conv(
    x_ptr, weight_ptr, bias_ptr, memory_ptr, slots_ptr, y_ptr, channels, x_stride,
    W: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = channel < channels
    kept = memory_ptr + tl.load(slots_ptr + row).to(tl.int64) * (W - 1) * channels + channel
    x = tl.load(x_ptr + row * x_stride + channel, mask=known, other=0.0)
    z = x.to(tl.float32) * tl.load(weight_ptr + channel * W + (W - 1), mask=known, other=0.0).to(tl.float32)
    for j in tl.static_range(W - 1):
        earlier = tl.load(kept + j * channels, mask=known, other=0.0)
        z += earlier.to(tl.float32) * tl.load(weight_ptr + channel * W + j, mask=known, other=0.0).to(
            tl.float32
        )
        if j > 0:
            tl.store(kept + (j - 1) * channels, earlier, mask=known)
    if W > 1:
        tl.store(kept + (W - 2) * channels, x, mask=known)
    if BIAS:
        z += tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * channels + channel, (z * tl.sigmoid(z)).to(y_ptr.dtype.element_ty), mask=known)


@triton.jit
def _unit(ptr, eps, D: tl.constexpr):
    x = tl.load(ptr + tl.arange(0, D)).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, 0) + eps)


@triton.jit
def _rule(
    qkv_ptr, z_ptr, b_ptr, a_ptr, decay_ptr, dt_bias_ptr, norm_ptr, states_ptr, slots_ptr, read_ptr,
    heads, k_heads, group, qkv_stride, z_stride, b_stride, a_stride, scale, unit_eps, norm_eps,
    D: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    inner, column = tl.arange(0, D), tl.arange(0, F)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    at = states_ptr + (slot * heads + head) * D * F + inner[:, None] * F + column[None, :]
    state = tl.load(at)
    qkv = qkv_ptr + row * qkv_stride
    q = _unit(qkv + head // group * D, unit_eps, D) * scale
    k = _unit(qkv + (k_heads + head // group) * D, unit_eps, D)
    v = tl.load(qkv + 2 * k_heads * D + head * F + column).to(tl.float32)
    beta = tl.sigmoid(tl.load(b_ptr + row * b_stride + head).to(tl.float32))
    raw = tl.load(a_ptr + row * a_stride + head).to(tl.float32) + tl.load(dt_bias_ptr + head).to(tl.float32)
    # log(1 + e^raw): raw to fp32 from 20 on; of a small e^raw the sum with 1 would keep few digits.
    grown = tl.exp(tl.minimum(raw, 20.0))
    step = tl.where(grown < 0.003, grown - 0.5 * grown * grown, tl.log(1.0 + grown))
    step = tl.where(raw > 20.0, raw, step)
    state *= tl.exp(-tl.exp(tl.load(decay_ptr + head).to(tl.float32)) * step)
    change = beta * (v - tl.sum(state * k[:, None], 0))
    state += k[:, None] * change[None, :]
    tl.store(at, state)
    out = tl.sum(state * q[:, None], 0)
    gate = tl.load(z_ptr + row * z_stride + head * F + column).to(tl.float32)
    normed = out * tl.rsqrt(tl.sum(out * out, 0) / F + norm_eps) * tl.load(norm_ptr + column).to(tl.float32)
    read = (normed * gate * tl.sigmoid(gate)).to(read_ptr.dtype.element_ty)
    tl.store(read_ptr + (row * heads + head) * F + column, read)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, memory: Tensor, slots: Tensor) -> Tensor:
    assert x.stride(1) == 1 and weight.is_contiguous() and memory.is_contiguous()
    rows, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _conv[(rows, triton.cdiv(channels, CHANNELS))](
        x, weight, weight if bias is None else bias, memory, slots, y, channels, x.stride(0),
        W=weight.shape[1], BIAS=bias is not None, BLOCK=CHANNELS, num_warps=4,
    )  # fmt: skip
    return y


def rule(
    qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, weights: DeltaWeights, states: Tensor, slots: Tensor
) -> Tensor:
    assert states.is_contiguous() and states.dtype == torch.float32
    assert all(x.stride(1) == 1 for x in (qkv, z, b, a))
    rows, (_, heads, of_k, of_v) = qkv.shape[0], states.shape
    k_heads = (qkv.shape[1] - heads * of_v) // (2 * of_k)
    read = qkv.new_empty(rows, heads * of_v)
    _rule[(heads, rows)](
        qkv, z, b, a, weights.decay, weights.dt_bias, weights.norm, states, slots, read,
        heads, k_heads, heads // k_heads, qkv.stride(0), z.stride(0), b.stride(0), a.stride(0),
        of_k**-0.5, EPS, weights.eps, D=of_k, F=of_v, num_warps=max(1, min(16, of_k * of_v // ELEMENTS_OF_WARP)),
    )  # fmt: skip
    return read
