"""Every attention implementation that this machine has, forward and backward, against the formula in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.diagnostics.checks import NotHere, Unsound
from pronghorn.diagnostics.compare import device, draw, dtypes, relative
from pronghorn.errors import AttentionUnavailable
from pronghorn.kernels import attention as kernels

LENGTHS = (5, 70, 1, 33)
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64


def cudnn() -> str:
    return _check("cudnn")


def flash() -> str:
    return _check("flash")


def flex() -> str:
    return _check("flex")


def cpu() -> str:
    return _check("cpu")


def sdpa() -> str:
    return _check("sdpa")


def eager() -> str:
    return _check("eager")


def _check(backend: str) -> str:
    """Packed documents, grouped heads: out, dq, dk and dv."""
    dtype = dtypes()[0]
    try:
        kernels.choose_backend(device(), dtype, HEAD_DIM, wanted=backend)
    except AttentionUnavailable as refusal:
        raise NotHere(refusal.message.partition(", but ")[2] or refusal.message) from None
    tokens = sum(LENGTHS)
    q, dout = (draw(tokens, HEADS, HEAD_DIM, dtype=dtype, seed=i) for i in range(2))
    k, v = (draw(tokens, KV_HEADS, HEAD_DIM, dtype=dtype, seed=i) for i in (2, 3))
    offsets = torch.tensor((0, *LENGTHS), device=device()).cumsum(0).int()
    docs = kernels.Documents(offsets, max(LENGTHS), LENGTHS)
    call = kernels.AttentionCall(HEAD_DIM**-0.5, None, backend)
    out, lse = kernels.attention_forward(q, k, v, docs, call)
    found = (out, *kernels.attention_backward(dout, q, k, v, out, lse, docs, call))
    # Softmax weights and gradients go through 16 bits once each; the norm averages their roundings.
    bound = 2 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 2e-5
    errors = {}
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), found, _truth(q, k, v, dout), strict=True):
        errors[name] = relative(actual, expected)
        if not errors[name] <= bound:
            raise Unsound(
                f"{name} is off by {errors[name]:.1e} of its norm, allowed {bound:.1e}",
                "choose another implementation with attention=... and report this",
            )
    worst = max(errors, key=lambda name: errors[name])
    return f"out, dq, dk, dv in {str(dtype).removeprefix('torch.')}: off by at most {errors[worst]:.1e} of the norm"


def _truth(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """softmax(scale · QKᵀ + mask) V document by document, and its gradients, in fp64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    group, outs, start = HEADS // KV_HEADS, [], 0
    for length in LENGTHS:
        wq, wk, wv = (x[start : start + length].transpose(0, 1) for x in leaves)
        wk, wv = wk.repeat_interleave(group, 0), wv.repeat_interleave(group, 0)
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        weights = (wq @ wk.mT * HEAD_DIM**-0.5).masked_fill(future, float("-inf")).softmax(-1)
        outs.append((weights @ wv).transpose(0, 1))
        start += length
    out = torch.cat(outs)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout.double()))
