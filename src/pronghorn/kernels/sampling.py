"""Choosing the next token of each row from its logits.

In the order in which Transformers does it: logits of seen tokens are divided by the repetition penalty (multiplied
where negative) and all by the temperature; then only those stay that are among the `top_k` largest, in the smallest
set of largest ones with `top_p` of what is left, and at least `min_p` times as probable as the most likely one. Each
cut keeps the logits above a threshold, so one threshold holds for all three. Of what stays the token is drawn in the
vocabulary's order by one uniform number,

    u = uniform(seed, position of the token in the answer),     token = min {i: Σ_{j ≤ i} p_j > u}

so a row's token depends on nothing but its own logits, seed and position. `uniform` is Philox 4x32-10 (Salmon et al.
2011), the first word of the block whose counter is the position and whose key is the seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Choice:
    """How each row's token is chosen; all [B] on the logits' device.

    Args:
        temperature: fp32, 0 takes the largest.
        top_k: int32, 0 keeps all. top_p: fp32, 1 keeps all. min_p: fp32, 0 keeps all.
        penalty: fp32, 1 changes nothing.
        uniform: fp32 in [0, 1).
        seen: bool [B, V], what the penalty applies to; None where no row has one.
        most: the largest `top_k`, where every row that draws has one; else 0.
        draws: whether any row has a temperature. cuts: whether any row cuts.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    penalty: Tensor
    uniform: Tensor
    seen: Tensor | None
    most: int
    draws: bool
    cuts: bool


def choose(logits: Tensor, choice: Choice) -> Tensor:
    """The next token of each row, int64 [B], for logits [B, V]."""
    scores = logits.float()
    if choice.seen is not None:
        scores = penalised(scores, choice.seen, choice.penalty)
    likeliest = scores.argmax(-1)
    if not choice.draws:
        return likeliest
    random = choice.temperature > 0
    scores = scores / torch.where(random, choice.temperature, 1.0)[:, None]
    if choice.cuts:
        scores = scores.masked_fill(scores < threshold(scores, choice)[:, None], float("-inf"))
    sums = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    target = choice.uniform.double()[:, None] * sums[:, -1:]
    drawn = torch.searchsorted(sums, target, right=True).squeeze(1)
    # Rounding may leave the target at the very end: the last token with a probability is meant then.
    return torch.where(random, drawn.clamp_(max=logits.shape[1] - 1), likeliest)


def penalised(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Scores [B, V] with those of seen tokens made less likely."""
    by = penalty[:, None]
    return torch.where(seen, torch.where(scores < 0, scores * by, scores / by), scores)


def threshold(scores: Tensor, choice: Choice) -> Tensor:
    """The smallest score [B] that stays."""
    # Where all rows take a few, the rest need not be put in order.
    taken = min(choice.most, scores.shape[1])
    ordered = scores.topk(taken, -1).values if taken else scores.sort(-1, descending=True).values
    last = ordered.shape[1] - 1
    k = torch.where(choice.top_k > 0, choice.top_k.long() - 1, last).clamp(max=last)
    smallest = ordered.gather(1, k[:, None])
    ordered = ordered.masked_fill(ordered < smallest, float("-inf"))
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # What comes before a token has less than top_p: it belongs to the smallest set that reaches it.
    count = (before < choice.top_p[:, None]).sum(-1, keepdim=True).clamp_(min=1)
    # Rounding would let the last few of a whole vocabulary go.
    nucleus = ordered.gather(1, count - 1).masked_fill(choice.top_p[:, None] >= 1, float("-inf"))
    likely = ordered[:, :1] + choice.min_p.log()[:, None]
    return torch.maximum(torch.maximum(smallest, nucleus), likely).squeeze(1)


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of a seed and a position."""
    key = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = position & _MASK, 0, 0, 0
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _MASK, (a >> 32) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    signed = c0 - (1 << 32) if c0 & 0x80000000 else c0
    return min((-signed - 1 if signed < 0 else signed) * 4.6566127342e-10, 1.0 - 2.0**-24)
