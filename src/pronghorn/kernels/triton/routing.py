"""Routing in Triton: choosing experts, and sorting the rows by counting. See `kernels.routing`.

Three launches: scores, the k highest and each block's counts of tokens by expert; sums of the counts over the blocks
before; places. Nothing is sorted: a row's place is where its expert's rows begin, plus how many tokens of the blocks
before and of the block went there before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.kernels.grouped_matmul import Groups

if TYPE_CHECKING:
    from pronghorn.kernels.routing import Routing, Scoring

#: elements [tokens, experts] of a program
TILE = 2048
#: experts and blocks that a program of `_scan` takes at a time
_SCANNED = (16, 128)
#: the wish for an expert that does not come into question; those that are taken already are wished for less
_NEVER = tl.constexpr(-1e30)


@triton.jit
def _scores(logits_ptr, rows, e, tokens, experts, SIGMOID: tl.constexpr):
    """Scores [BT, E] in fp32; zero where there is no expert."""
    known = (rows < tokens)[:, None] & (e < experts)[None, :]
    at = logits_ptr + rows.to(tl.int64)[:, None] * experts + e[None, :]
    logits = tl.load(at, mask=known, other=float("-inf")).to(tl.float32)
    logits = tl.where((rows < tokens)[:, None], logits, 0.0)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        value = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = value / tl.sum(value, 1)[:, None]
    return scores


@triton.jit
def _highest(rest, e):
    """The first of the highest of each row [BT, E], and where it is [BT, E]."""
    index = tl.argmax(rest, 1)
    return index, e[None, :] == index[:, None]


@triton.jit
def _of_best_groups(
    wishes, e, experts, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_SCORES: tl.constexpr,
    G: tl.constexpr, E: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """`wishes` [BT, E] for the experts of a token's best groups."""
    size, g = experts // GROUPS, tl.arange(0, G)
    sums = tl.full([BT, G], _NEVER, tl.float32)
    for group in range(GROUPS):
        mine = (e >= group * size) & (e < (group + 1) * size)
        rest = tl.where(mine[None, :], wishes, _NEVER)
        total = tl.zeros([BT], tl.float32)
        for _ in range(GROUP_SCORES):
            total += tl.max(rest, 1)
            _index, highest = _highest(rest, e)
            rest = tl.where(highest, _NEVER, rest)
        sums = tl.where(g[None, :] == group, total[:, None], sums)
    kept = tl.full([BT, E], _NEVER, tl.float32)
    for _ in range(TOP_GROUPS):
        index, highest = _highest(sums, g)
        sums = tl.where(highest, float("-inf"), sums)
        kept = tl.where((e // size)[None, :] == index[:, None], wishes, kept)
    return kept


@triton.jit
def _choose(
    logits_ptr, bias_ptr, indices_ptr, weights_ptr, counts_ptr, tokens, experts, scale,
    NORMALISED: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr,
    GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_SCORES: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, E: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    rows, e, column = block * BT + tl.arange(0, BT), tl.arange(0, E), tl.arange(0, KP)
    known = rows < tokens
    scores = _scores(logits_ptr, rows, e, tokens, experts, SIGMOID)
    wishes = scores
    if BIASED:
        wishes += tl.load(bias_ptr + e, mask=e < experts, other=0.0).to(tl.float32)[None, :]
    # A score that is no number is chosen last, so that every token has k different experts.
    rest = tl.where((e < experts)[None, :], tl.where(wishes == wishes, wishes, -1e20), _NEVER)
    if TOP_GROUPS < GROUPS:
        rest = _of_best_groups(rest, e, experts, GROUPS, TOP_GROUPS, GROUP_SCORES, G, E, BT)
    indices, values = tl.zeros([BT, KP], tl.int32), tl.zeros([BT, KP], tl.float32)
    taken = tl.zeros([BT, E], tl.int32)
    # Not unrolled: a search for the highest is much code.
    for j in range(K):
        index, mine = _highest(rest, e)
        value = tl.sum(tl.where(mine, scores, 0.0), 1)
        rest = tl.where(mine, float("-inf"), rest)
        taken = tl.where(mine, 1, taken)
        here = column[None, :] == j
        indices, values = tl.where(here, index[:, None], indices), tl.where(here, value[:, None], values)
    if NORMALISED:
        values = values / tl.sum(values, 1)[:, None]
    values = values * scale
    at = rows.to(tl.int64)[:, None] * K + column[None, :]
    inside = known[:, None] & (column < K)[None, :]
    tl.store(indices_ptr + at, indices, mask=inside)
    tl.store(weights_ptr + at, values, mask=inside)
    chosen = tl.where(known[:, None] & (e < experts)[None, :], taken, 0)
    tl.store(counts_ptr + block * experts + e, tl.sum(chosen, 0), mask=e < experts)


@triton.jit
def _scan(counts_ptr, totals_ptr, blocks, experts, E: tl.constexpr, B: tl.constexpr):
    """counts [blocks, experts] become the sums of the blocks before; totals [experts]."""
    e = tl.program_id(0) * E + tl.arange(0, E)
    known = e < experts
    before = tl.zeros([E], tl.int32)
    for start in range(0, blocks, B):
        block = start + tl.arange(0, B)
        inside = (block < blocks)[:, None] & known[None, :]
        at = counts_ptr + block[:, None] * experts + e[None, :]
        counts = tl.load(at, mask=inside, other=0)
        tl.store(at, before[None, :] + tl.cumsum(counts, 0) - counts, mask=inside)
        before += tl.sum(counts, 0)
    tl.store(totals_ptr + e, before, mask=known)


@triton.jit
def _place(
    indices_ptr, weights_ptr, before_ptr, totals_ptr,
    ends_ptr, experts_ptr, tokens_ptr, places_ptr, row_weights_ptr, tokens, experts,
    K: tl.constexpr, E: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    rows, e = block * BT + tl.arange(0, BT), tl.arange(0, E)
    known = rows < tokens
    totals = tl.load(totals_ptr + e, mask=e < experts, other=0)
    ends = tl.cumsum(totals, 0)
    if block == 0:
        tl.store(ends_ptr + e, ends, mask=e < experts)
    before = tl.load(before_ptr + block * experts + e, mask=e < experts, other=0)
    chosen = tl.zeros([BT, E], tl.int32)
    for j in range(K):
        index = tl.load(indices_ptr + rows.to(tl.int64) * K + j, mask=known, other=-1)
        chosen += (e[None, :] == index[:, None]).to(tl.int32)
    place_of = (ends - totals + before)[None, :] + tl.cumsum(chosen, 0) - chosen
    for j in range(K):
        at = rows.to(tl.int64) * K + j
        index = tl.load(indices_ptr + at, mask=known, other=-1)
        place = tl.sum(tl.where(e[None, :] == index[:, None], place_of, 0), 1)
        tl.store(places_ptr + at, place, mask=known)
        tl.store(tokens_ptr + place, rows, mask=known)
        tl.store(experts_ptr + place, index, mask=known)
        tl.store(row_weights_ptr + place, tl.load(weights_ptr + at, mask=known, other=0.0), mask=known)


def _blocks(tokens: int, experts: int) -> tuple[int, int, int]:
    """Padded experts, tokens of a block, blocks."""
    e = triton.next_power_of_2(experts)
    height = max(4, TILE // e)
    return e, height, triton.cdiv(tokens, height)


def route(logits: Tensor, scoring: Scoring, bias: Tensor | None = None) -> Routing:
    from pronghorn.kernels.routing import Routing

    (tokens, experts), k, device = logits.shape, scoring.top_k, logits.device
    e, height, blocks = _blocks(tokens, experts)
    logits = logits.contiguous()
    indices = torch.empty(tokens, k, dtype=torch.int64, device=device)
    weights = torch.empty(tokens, k, dtype=torch.float32, device=device)
    counts = torch.empty(blocks, experts, dtype=torch.int32, device=device)
    totals, ends = (torch.empty(experts, dtype=torch.int32, device=device) for _ in range(2))
    of_rows, row_tokens = (torch.empty(tokens * k, dtype=torch.int64, device=device) for _ in range(2))
    places, row_weights = torch.empty_like(indices), torch.empty_like(weights).view(-1)
    _choose[(blocks,)](
        logits, logits if bias is None else bias, indices, weights, counts, tokens, experts, scoring.scale,
        NORMALISED=scoring.normalised, SIGMOID=scoring.sigmoid, BIASED=bias is not None, GROUPS=scoring.groups,
        TOP_GROUPS=scoring.top_groups, GROUP_SCORES=scoring.group_scores,
        G=triton.next_power_of_2(scoring.groups), K=k, KP=triton.next_power_of_2(k), E=e, BT=height, num_warps=4,
    )  # fmt: skip
    _scan[(triton.cdiv(experts, _SCANNED[0]),)](
        counts, totals, blocks, experts, E=_SCANNED[0], B=_SCANNED[1], num_warps=4
    )
    _place[(blocks,)](
        indices, weights, counts, totals, ends, of_rows, row_tokens, places, row_weights, tokens, experts,
        K=k, E=e, BT=height, num_warps=4,
    )  # fmt: skip
    return Routing(indices, weights, Groups(of_rows, experts, ends), row_tokens, places, row_weights)


# --- backward --------------------------------------------------------------------------------------------------


@triton.jit
def _backward(
    dweights_ptr, logits_ptr, indices_ptr, places_ptr, out_ptr, tokens, experts, scale,
    NORMALISED: tl.constexpr, SIGMOID: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    rows, e = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, E)
    known = rows < tokens
    scores = _scores(logits_ptr, rows, e, tokens, experts, SIGMOID)
    grad, chosen = tl.zeros([BT, E], tl.float32), tl.zeros([BT, E], tl.float32)
    for j in range(K):
        at = rows.to(tl.int64) * K + j
        index = tl.load(indices_ptr + at, mask=known, other=-1)
        place = tl.load(places_ptr + at, mask=known, other=0)
        dweight = tl.load(dweights_ptr + place, mask=known, other=0.0)
        mine = e[None, :] == index[:, None]
        grad, chosen = tl.where(mine, dweight[:, None], grad), tl.where(mine, scores, chosen)
    if NORMALISED:
        total = tl.where(known, tl.sum(chosen, 1), 1.0)[:, None]
        inner = tl.sum(grad * chosen, 1)[:, None] / total
        grad = tl.where(chosen > 0.0, (grad - inner) / total, 0.0)
    if SIGMOID:
        grad = scores * (1.0 - scores) * grad
    else:
        grad = scores * (grad - tl.sum(grad * scores, 1)[:, None])
    to = out_ptr + rows.to(tl.int64)[:, None] * experts + e[None, :]
    tl.store(to, grad * scale, mask=known[:, None] & (e < experts)[None, :])


def backward(dweights: Tensor, logits: Tensor, routing: Routing, scoring: Scoring) -> Tensor:
    tokens, experts = logits.shape
    e, height, blocks = _blocks(tokens, experts)
    out = torch.empty(tokens, experts, dtype=torch.float32, device=logits.device)
    _backward[(blocks,)](
        dweights.contiguous(), logits.contiguous(), routing.indices, routing.places, out, tokens, experts,
        scoring.scale, NORMALISED=scoring.normalised, SIGMOID=scoring.sigmoid, K=scoring.top_k,
        E=e, BT=height, num_warps=4,
    )  # fmt: skip
    return out
