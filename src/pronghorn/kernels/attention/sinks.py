"""Attention sinks on top of any implementation that gives the softmax's statistics.

A sink is a logit s[n] in the denominator without a value. With L = log Σ_j exp(logits) of the kernel and
L' = log(exp L + exp s), the output is out · exp(L - L'). A flash-style backward rebuilds weights as exp(logits - L')
and reads Σ_d dout·out, both of which are right with L' and the new output, so it needs no change.
    ds[n] = -Σ_t exp(s[n] - L'[t, n]) · Σ_d dout[t, n, d] out[t, n, d]
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Change out [T, N, D] and lse [T, N] in place to those with sinks [N]."""
    wider = torch.logaddexp(lse, sinks.detach().to(lse.dtype))
    out.copy_(out * (lse - wider).exp_().unsqueeze(-1))
    lse.copy_(wider)


def softmax_with_sinks(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """The weights of logits [..., L] with one sink [..., 1] a row in their sum; without one the plain softmax."""
    if sinks is None:
        return logits.softmax(-1)
    column = sinks.detach().to(logits.dtype).expand(*logits.shape[:-1], 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1]


def sink_grad(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The sinks' gradient [N] in `lse`'s dtype, from the output and the statistics with sinks."""
    delta = torch.linalg.vecdot(dout.to(lse.dtype), out.to(lse.dtype))
    return -((sinks.detach().to(lse.dtype) - lse).exp_().mul_(delta)).sum(0)
