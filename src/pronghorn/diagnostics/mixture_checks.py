"""The kernels of mixtures of experts on this machine, forward and backward, against formulas in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.diagnostics.checks import Unsound
from pronghorn.diagnostics.compare import Comparison, close, device, draw, dtypes
from pronghorn.diagnostics.kernel_checks import said
from pronghorn.kernels import grouped_adapters, grouped_glu, grouped_matmul, grouped_rows
from pronghorn.kernels.grouped_matmul import Groups, LowRankRows
from pronghorn.kernels.routing import Scoring

#: rows of each expert: uneven, with an empty one
COUNTS = (37, 0, 140, 3)
WIDTH, OUT, RANK = 328, 184, 8


def _groups() -> Groups:
    experts = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))
    return Groups(experts.to(device()), len(COUNTS))


def products() -> str:
    """Grouped products either way with an adapter in the launch, and sums over an expert's rows."""
    compared, groups = Comparison(), _groups()
    rows = len(groups.experts)
    for dtype in dtypes():
        x, dy = draw(rows, WIDTH, dtype=dtype), draw(rows, OUT, dtype=dtype, seed=1)
        weight = draw(len(COUNTS), OUT, WIDTH, dtype=dtype, seed=2, scale=0.1)
        a = draw(len(COUNTS), RANK, WIDTH, dtype=dtype, seed=3, scale=0.1)
        b = draw(len(COUNTS), OUT, RANK, dtype=dtype, seed=4, scale=0.1)
        left = draw(rows, RANK, dtype=dtype, seed=5)
        wide, of_row = [t.double() for t in (x, dy, left)], groups.experts
        forward = torch.einsum("sk,snk->sn", wide[0], weight.double()[of_row])
        forward += torch.einsum("sr,snr->sn", wide[2], b.double()[of_row])
        backward = torch.einsum("sn,snk->sk", wide[1], weight.double()[of_row])
        backward += torch.einsum("sr,srk->sk", wide[2], a.double()[of_row])
        sums = torch.zeros(len(COUNTS), RANK, WIDTH, dtype=torch.float64, device=x.device)
        sums.index_add_(0, of_row, wide[2][:, :, None] * wide[0][:, None, :])
        y = grouped_matmul.grouped_matmul(x, weight, groups, low_rank=LowRankRows(left, b))
        dx = grouped_matmul.grouped_matmul(dy, weight, groups, transposed=True, low_rank=LowRankRows(left, a))
        close(compared, "y", y, forward)
        close(compared, "dx", dx, backward)
        close(compared, "dA", grouped_matmul.grouped_outer(left, x, groups), sums)
        peft = draw(OUT, RANK * len(COUNTS), dtype=torch.float32, seed=6)
        stacked = grouped_adapters.stack_b(peft, len(COUNTS), 0.5, torch.float32)
        wanted = peft.double().view(OUT, RANK, -1).permute(2, 0, 1) * 0.5
        compared.near("stacked B", stacked, wanted)
        compared.near("B", grouped_adapters.unstack_b(stacked, 2.0), peft.double())
    return said(compared)


def unit() -> str:
    """The experts' gated units with routing weights, and a token's rows added up."""
    compared, tokens, top_k = Comparison(), 37, 3
    clamped = grouped_glu.Gating(grouped_glu.CLAMPED, interleaved=True, alpha=1.702, limit=1.0)
    for dtype in dtypes():
        for gating in (grouped_glu.Gating("silu"), clamped):
            gate_up, dact = draw(tokens, 2 * OUT, dtype=dtype), draw(tokens, OUT, dtype=dtype, seed=1)
            weights = draw(tokens, dtype=torch.float32, seed=2)
            leaves = [gate_up.double().requires_grad_(), weights.double().requires_grad_()]
            truth = _gated(*gating.split(leaves[0]), gating) * leaves[1][:, None]
            grads = torch.autograd.grad(truth, leaves, dact.double())
            compared.near("act", grouped_glu.grouped_glu_forward(gate_up, weights, gating), truth, slack=2.0)
            found = grouped_glu.grouped_glu_backward_(dact.clone(), gate_up.clone(), weights, gating)
            for name, got, want in zip(
                ("act again", "dgate_up", "dweights"), found, (truth, *grads), strict=True
            ):
                compared.near(name, got, want, slack=4.0)
        y, residual = draw(tokens * top_k, WIDTH, dtype=dtype), draw(tokens, WIDTH, dtype=dtype, seed=1)
        places = torch.arange(tokens * top_k, device=y.device).flip(0).view(tokens, top_k)
        wanted = y.double()[places].sum(1) + residual.double()
        compared.near("rows", grouped_rows.gather_rows(y, places, residual), wanted)
    return said(compared)


def _gated(gate: Tensor, up: Tensor, gating: grouped_glu.Gating) -> Tensor:
    if gating.activation != grouped_glu.CLAMPED:
        return torch.nn.functional.silu(gate) * up
    gate, up = gate.clamp(max=gating.limit), up.clamp(-gating.limit, gating.limit)
    return gate * torch.sigmoid(gating.alpha * gate) * (up + 1)


def routing() -> str:
    """Experts, weights, sorted rows, and the gradient of the logits."""
    compared = Comparison()
    limited = Scoring(64, 4, sigmoid=True, scale=2.5, groups=8, top_groups=3, group_scores=2)
    for scoring in (Scoring(40, 5), Scoring(16, 4, normalised=False), limited):
        logits = draw(300, scoring.experts, dtype=torch.float32)
        bias = draw(scoring.experts, dtype=torch.float32, seed=2) if scoring.limited else None
        found = scoring.route(logits, bias)
        if not torch.equal(found.indices, scoring.route(logits, bias, impl="torch").indices):
            raise Unsound("other experts than the reference takes")
        order = found.places.view(-1).argsort()
        if not torch.equal(found.groups.experts, found.indices.view(-1)[order].sort(stable=True).values):
            raise Unsound("rows are not sorted by expert")
        exact = logits.double().requires_grad_()
        taken = (exact.sigmoid() if scoring.sigmoid else exact.softmax(-1)).gather(1, found.indices)
        weights = scoring.scale * (taken / taken.sum(1, keepdim=True) if scoring.normalised else taken)
        dweights = draw(found.tokens.numel(), dtype=torch.float32, seed=1)
        (wanted,) = torch.autograd.grad(weights, exact, dweights.double()[found.places])
        compared.near("weights", found.weights, weights, slack=2.0)
        compared.near("dlogits", scoring.backward(dweights, logits, found), wanted, slack=8.0)
    return said(compared)
