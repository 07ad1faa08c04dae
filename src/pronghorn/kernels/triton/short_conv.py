"""The short causal convolution in Triton, a tile of tokens and channels a program: see `kernels.short_conv`.

Neighbouring rows are read again from the cache rather than kept: backward needs z of the tokens that a token reaches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: tokens and channels of a tile
TOKENS, CHANNELS = 32, 64


@triton.jit
def _reaches(document_ptr, token, j, tokens):
    """Whether tokens reach those j after them."""
    inside = (token >= 0) & (token + j < tokens)
    own = tl.load(document_ptr + token, mask=inside, other=-1)
    other = tl.load(document_ptr + token + j, mask=inside, other=-2)
    return own == other


@triton.jit
def _rows(ptr, token, stride, channel, known):
    return tl.load(ptr + token[:, None].to(tl.int64) * stride + channel[None, :], mask=known, other=0.0).to(
        tl.float32
    )


@triton.jit
def _summed(
    x_ptr, weight_ptr, bias_ptr, document_ptr, token, channel, known_channel, tokens, x_stride,
    W: tl.constexpr, BIAS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """z of a tile."""
    z = tl.zeros([BT, BC], tl.float32)
    for j in tl.static_range(W):
        known = _reaches(document_ptr, token - j, j, tokens)[:, None] & known_channel[None, :]
        tap = tl.load(weight_ptr + channel * W + (W - 1 - j), mask=known_channel, other=0.0).to(tl.float32)
        z += _rows(x_ptr, token - j, x_stride, channel, known) * tap[None, :]
    if BIAS:
        z += tl.load(bias_ptr + channel, mask=known_channel, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _forward(
    x_ptr, weight_ptr, bias_ptr, document_ptr, y_ptr, tokens, channels, x_stride,
    W: tl.constexpr, BIAS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    known = channel < channels
    z = _summed(
        x_ptr, weight_ptr, bias_ptr, document_ptr, token, channel, known, tokens, x_stride, W, BIAS, BT, BC
    )
    to = y_ptr + token[:, None].to(tl.int64) * channels + channel[None, :]
    tl.store(
        to, (z * tl.sigmoid(z)).to(y_ptr.dtype.element_ty), mask=(token < tokens)[:, None] & known[None, :]
    )


@triton.jit
def _backward(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, document_ptr, dx_ptr, dweight_ptr, dbias_ptr, tokens, channels, x_stride,
    dy_stride, W: tl.constexpr, BIAS: tl.constexpr, WEIGHTS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx of a tile, and with WEIGHTS its share of the weight's and the bias's gradients."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    known_channel = channel < channels
    dx = tl.zeros([BT, BC], tl.float32)
    own = dx
    for j in tl.static_range(W):
        reached = token + j
        known = _reaches(document_ptr, token, j, tokens)[:, None] & known_channel[None, :]
        z = _summed(
            x_ptr, weight_ptr, bias_ptr, document_ptr, reached, channel, known_channel, tokens, x_stride,
            W, BIAS, BT, BC,
        )  # fmt: skip
        gate = tl.sigmoid(z)
        dz = _rows(dy_ptr, reached, dy_stride, channel, known) * gate * (1.0 + z * (1.0 - gate))
        tap = tl.load(weight_ptr + channel * W + (W - 1 - j), mask=known_channel, other=0.0).to(tl.float32)
        dx += dz * tap[None, :]
        if j == 0:
            own = dz
    inside = (token < tokens)[:, None] & known_channel[None, :]
    to = dx_ptr + token[:, None].to(tl.int64) * channels + channel[None, :]
    tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if WEIGHTS:
        share = tl.program_id(0).to(tl.int64) * channels + channel
        for j in tl.static_range(W):
            known = _reaches(document_ptr, token - j, j, tokens)[:, None] & known_channel[None, :]
            product = own * _rows(x_ptr, token - j, x_stride, channel, known)
            tl.store(dweight_ptr + share * W + (W - 1 - j), tl.sum(product, 0), mask=known_channel)
        if BIAS:
            tl.store(dbias_ptr + share, tl.sum(own, 0), mask=known_channel)


def _grid(x: Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[0], TOKENS), triton.cdiv(x.shape[1], CHANNELS)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, document: Tensor) -> Tensor:
    assert x.stride(1) == 1 and weight.is_contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _forward[_grid(x)](
        x, weight, weight if bias is None else bias, document, y, *x.shape, x.stride(0),
        W=weight.shape[1], BIAS=bias is not None, BT=TOKENS, BC=CHANNELS, num_warps=4,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, document: Tensor, need_weight_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    assert x.stride(1) == 1 and dy.stride(1) == 1 and weight.is_contiguous()
    dx, grid = torch.empty(x.shape, dtype=x.dtype, device=x.device), _grid(x)
    shares = grid[0] if need_weight_grad else 0
    dweight = x.new_empty(shares, *weight.shape, dtype=torch.float32)
    dbias = x.new_empty(shares if bias is not None else 0, x.shape[1], dtype=torch.float32)
    _backward[grid](
        dy, x, weight, weight if bias is None else bias, document, dx, dweight, dbias, *x.shape, x.stride(0),
        dy.stride(0), W=weight.shape[1], BIAS=bias is not None, WEIGHTS=need_weight_grad,
        BT=TOKENS, BC=CHANNELS, num_warps=8,
    )  # fmt: skip
    if not need_weight_grad:
        return dx, None, None
    return dx, dweight.sum(0), None if bias is None else dbias.sum(0)
