"""What stands between two decoding steps: the likeliest tokens of one, and the vectors that the next one begins with.

    tokens[b] = min {i: logits[b, i] = max_j logits[b, j]};   lengths[b] += 1 where lengths[b] > 0;   given[b] = -1
    told[turns[b], 1 + b] = tokens[b];   told[turns[0], 0] = lost;   turns[b] = (turns[b] + 1) mod R
    x[b] = weight[given[b]] where given[b] ≥ 0, else weight[tokens[b]]

Shapes: logits [B, V] in 16 or 32 bits; tokens int64 [B]; lengths, given, turns int32 [B]; told int64 [R, > B];
lost int64 [1]; weight [V, H]; x [B, H].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, use_triton


class Rows(NamedTuple):
    """What a step leaves of its rows: see the module's formulas.

    Args:
        told: for the kernel in the host's pinned memory: the host reads there, without a copy, what it has waited for.
            As many steps as it has rows may be under way.
    """

    tokens: Tensor
    lengths: Tensor
    given: Tensor
    turns: Tensor
    told: Tensor
    lost: Tensor


def take_likeliest_(logits: Tensor, rows: Rows, *, impl: Impl | None = None) -> None:
    """Write each row's likeliest token, to where the host reads it, too, and what rows find in their next step.

    NaN counts as the largest.
    """
    if use_triton(logits, impl):
        from pronghorn.kernels.triton.next_token import take_likeliest_ as by_triton

        by_triton(logits, rows)
        return
    tokens, lengths, given, turns, told, lost = rows
    torch.argmax(logits, -1, out=tokens)
    lengths += lengths > 0
    given.fill_(-1)
    at = turns.long()
    told[at, torch.arange(1, 1 + len(tokens), device=told.device)] = tokens
    told[at[:1], 0] = lost
    turns.copy_((turns + 1) % len(told))


def embed_next(weight: Tensor, tokens: Tensor, given: Tensor, *, impl: Impl | None = None) -> Tensor:
    """The vectors [B, H] of the tokens that are given, or else of those that a step has left."""
    if use_triton(weight, impl):
        from pronghorn.kernels.triton.next_token import embed_next as by_triton

        return by_triton(weight, tokens, given)
    return torch.nn.functional.embedding(torch.where(given >= 0, given.long(), tokens), weight)
