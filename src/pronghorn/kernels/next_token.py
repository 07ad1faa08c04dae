"""What stands between two decoding steps: the likeliest tokens of one, and the vectors that the next one begins with.

    tokens[b] = min {i: logits[b, i] = max_j logits[b, j]};   lengths[b] += 1 where lengths[b] > 0;   given[b] = -1
    x[b] = weight[given[b]] where given[b] ≥ 0, else weight[tokens[b]]

Shapes: logits [B, V] in 16 or 32 bits; tokens int64 [B]; lengths, given int32 [B]; weight [V, H]; x [B, H].
"""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, use_triton


def take_likeliest_(
    logits: Tensor, tokens: Tensor, lengths: Tensor, given: Tensor, *, impl: Impl | None = None
) -> None:
    """Write each row's likeliest token, and what rows that hold a sequence find in their next step.

    NaN counts as the largest.
    """
    if use_triton(logits, impl):
        from pronghorn.kernels.triton.next_token import take_likeliest_ as by_triton

        by_triton(logits, tokens, lengths, given)
        return
    torch.argmax(logits, -1, out=tokens)
    lengths += lengths > 0
    given.fill_(-1)


def embed_next(weight: Tensor, tokens: Tensor, given: Tensor, *, impl: Impl | None = None) -> Tensor:
    """The vectors [B, H] of the tokens that are given, or else of those that a step has left."""
    if use_triton(weight, impl):
        from pronghorn.kernels.triton.next_token import embed_next as by_triton

        return by_triton(weight, tokens, given)
    return torch.nn.functional.embedding(torch.where(given >= 0, given.long(), tokens), weight)
