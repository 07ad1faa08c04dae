"""Grouped products, the experts' gated unit and rows of tokens against fp64, for every implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pronghorn.kernels.grouped_adapters import stack_b, unstack_b
from pronghorn.kernels.grouped_glu import CLAMPED, Gating, grouped_glu_backward_, grouped_glu_forward
from pronghorn.kernels.grouped_matmul import Groups, LowRankRows, grouped_matmul, grouped_outer
from pronghorn.kernels.grouped_rows import gather_rows, spread_rows
from tests.kernels.compare import DTYPES, IMPLS, RELATIVE, assert_near, random

#: rows of each expert: uneven with empty ones, all of them one's, fewer rows than experts, none at all
COUNTS = {
    "uneven": (3, 0, 37, 1, 64, 0, 5),
    "one": (0, 0, 70, 0),
    "few": (0, 1, 0, 0, 1, 0, 0, 0, 1),
    "none": (0, 0, 0),
}
#: N, K: odd sizes, and whole tiles
SIZES = {"odd": (37, 51), "whole": (64, 96), "narrow": (8, 72)}


def groups_of(counts: tuple[int, ...], device: torch.device) -> Groups:
    experts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return Groups(experts.to(device), len(counts))


def per_row(weight: Tensor, groups: Groups) -> Tensor:
    return weight.double()[groups.experts]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_where_groups_end(counts: tuple[int, ...], device: torch.device) -> None:
    assert groups_of(counts, device).ends.tolist() == torch.tensor(counts).cumsum(0).tolist()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "transposed"])
@pytest.mark.parametrize("rank", [0, 5])
def test_matmul(
    impl: str,
    counts: tuple[int, ...],
    size: tuple[int, int],
    transposed: bool,
    rank: int,
    device: torch.device,
) -> None:
    groups, (n, k), rows = groups_of(counts, device), size, sum(counts)
    x = random(rows, k, dtype=torch.float32, device=device)
    weight = random(len(counts), n, k, dtype=torch.float32, device=device, seed=1)
    expected = torch.einsum("sk,snk->sn", x.double(), per_row(weight, groups))
    low_rank = None
    if rank:
        left = random(rows, rank, dtype=torch.float32, device=device, seed=2)
        right = random(len(counts), n, rank, dtype=torch.float32, device=device, seed=3)
        expected += torch.einsum("sr,snr->sn", left.double(), per_row(right, groups))
        low_rank = LowRankRows(left, right.transpose(1, 2) if transposed else right)
    stored = weight.transpose(1, 2).contiguous() if transposed else weight
    actual = grouped_matmul(x, stored, groups, transposed=transposed, low_rank=low_rank, impl=impl)
    if rows:
        assert_near(actual, expected, slack=2)
    assert actual.shape == (rows, n)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_in_lower_precision(impl: str, dtype: torch.dtype, device: torch.device) -> None:
    groups = groups_of(COUNTS["uneven"], device)
    x = random(len(groups.experts), 48, dtype=dtype, device=device)
    weight = random(groups.count, 40, 48, dtype=dtype, device=device, seed=1)
    left = random(len(groups.experts), 4, dtype=dtype, device=device, seed=2)
    right = random(groups.count, 40, 4, dtype=dtype, device=device, seed=3)
    expected = torch.einsum("sk,snk->sn", x.double(), per_row(weight, groups))
    expected += torch.einsum("sr,snr->sn", left.double(), per_row(right, groups))
    actual = grouped_matmul(x, weight, groups, low_rank=LowRankRows(left, right), impl=impl)
    if impl == "triton":
        assert_near(actual, expected, slack=2)
    # The reference adds the adapter's share to a rounded product: a second rounding, of a number of another size.
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= 2 * RELATIVE[dtype]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("size", [(37, 5), (16, 130), (70, 70)], ids=str)
def test_outer(impl: str, counts: tuple[int, ...], size: tuple[int, int], device: torch.device) -> None:
    groups, rows = groups_of(counts, device), sum(counts)
    left = random(rows, size[0], dtype=torch.float32, device=device)
    right = random(rows, size[1], dtype=torch.float32, device=device, seed=1)
    actual = grouped_outer(left, right, groups, impl=impl)
    expected = torch.zeros(len(counts), *size, dtype=torch.float64, device=device)
    expected.index_add_(0, groups.experts, left.double()[:, :, None] * right.double()[:, None, :])
    assert actual.dtype == torch.float32
    assert_near(actual, expected, slack=2)


@pytest.mark.parametrize("impl", IMPLS)
def test_operands_may_be_strided(impl: str, device: torch.device) -> None:
    groups = groups_of(COUNTS["uneven"], device)
    wide = random(len(groups.experts), 90, dtype=torch.float32, device=device)
    x, weight = wide[:, 20:68], random(groups.count, 40, 48, dtype=torch.float32, device=device)
    same = grouped_matmul(x.contiguous(), weight, groups, impl=impl)
    assert_near(grouped_matmul(x, weight, groups, impl=impl), same)
    right = wide[:, :16]
    same = grouped_outer(x.contiguous(), right.contiguous(), groups, impl=impl)
    assert_near(grouped_outer(x, right, groups, impl=impl), same)


def test_tiles_copied_by_tma(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The kernel's other way of loading, whose tiles may begin in one expert and end in the next."""
    module = pytest.importorskip("pronghorn.kernels.triton.grouped_matmul")
    if device.type != "cuda":
        monkeypatch.setattr(module, "is_wide", lambda x: False)
        monkeypatch.setattr(module, "_copies_tiles", lambda x: True)
    groups = groups_of(COUNTS["uneven"], device)
    dtype = torch.float32 if device.type != "cuda" else torch.bfloat16
    for n, k in ((40, 56), (64, 96), (8, 72)):
        x = random(len(groups.experts), k, dtype=dtype, device=device)
        weight = random(groups.count, n, k, dtype=dtype, device=device, seed=1)
        left = random(len(groups.experts), 5, dtype=dtype, device=device, seed=2)
        right = random(groups.count, n, 5, dtype=dtype, device=device, seed=3)
        expected = torch.einsum("sk,snk->sn", x.double(), per_row(weight, groups))
        expected += torch.einsum("sr,snr->sn", left.double(), per_row(right, groups))
        turned = weight.transpose(1, 2).contiguous(), LowRankRows(left, right.transpose(1, 2))
        for tiles in (module.Tiles(32, 32, 32, 4, 2), module.matmul_tiles(n, False, few=True)):
            plain = module.matmul(x, weight, groups, False, LowRankRows(left, right), tiles)
            assert_near(plain, expected, slack=2)
            assert_near(module.matmul(x, turned[0], groups, True, turned[1], tiles), expected, slack=2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_between_two_orders(impl: str, dtype: torch.dtype, device: torch.device) -> None:
    experts, out, rank = 5, 37, 3
    b = random(out, rank * experts, dtype=torch.float32, device=device)
    expected = b.double().view(out, rank, experts).permute(2, 0, 1) * 1.5
    stacked = stack_b(b, experts, 1.5, dtype, impl=impl)
    assert stacked.is_contiguous()
    assert_near(stacked, expected)
    again = unstack_b(expected.float().contiguous(), 2.0, impl=impl)
    assert_near(again, b.double() * 3.0)


# --- the gated unit --------------------------------------------------------------------------------------------

GATINGS = [
    Gating("silu"),
    Gating("gelu"),
    Gating("gelu_tanh"),
    Gating(CLAMPED, interleaved=True, alpha=1.702, limit=0.8),
]


def truth(gate_up: Tensor, weights: Tensor, gating: Gating) -> Tensor:
    gate, up = gating.split(gate_up)
    if gating.activation == CLAMPED:  # as Transformers writes it for gpt-oss
        gate = gate.clamp(min=None, max=gating.limit)
        up = up.clamp(min=-gating.limit, max=gating.limit)
        return (up + 1) * gate * torch.sigmoid(gate * gating.alpha) * weights[:, None]
    f = torch.nn.functional
    value = (
        f.silu(gate)
        if gating.activation == "silu"
        else f.gelu(gate, approximate="tanh" if gating.activation == "gelu_tanh" else "none")
    )
    return value * up * weights[:, None]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gating", GATINGS, ids=lambda g: g.activation)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_unit(impl: str, gating: Gating, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = random(11, 2 * 37, dtype=dtype, device=device)
    weights = random(11, dtype=torch.float32, device=device, seed=1).abs()
    dact = random(11, 37, dtype=dtype, device=device, seed=2)
    exact = [t.double().requires_grad_() for t in (gate_up, weights)]
    expected = truth(*exact, gating)  # type: ignore[call-arg]
    dgate_up, dweights = torch.autograd.grad(expected, exact, dact.double())
    assert_near(grouped_glu_forward(gate_up, weights, gating, impl=impl), expected.detach(), slack=2)
    found = grouped_glu_backward_(dact.clone(), gate_up.clone(), weights, gating, impl=impl)
    assert_near(found[0], expected.detach(), slack=2)
    assert_near(found[1], dgate_up, slack=2)
    assert_near(found[2].float(), dweights, slack=2)


# --- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_gather_is_the_gradient_of_spread(
    impl: str, dtype: torch.dtype, residual: bool, device: torch.device
) -> None:
    tokens, top, width = 7, 3, 1030
    order = torch.randperm(tokens * top, generator=torch.Generator().manual_seed(0)).to(device)
    places = torch.argsort(order).view(tokens, top)
    y = random(tokens * top, width, dtype=dtype, device=device)
    added = random(tokens, width, dtype=dtype, device=device, seed=1) if residual else None
    x = torch.zeros(tokens, width, dtype=torch.float64, device=device, requires_grad=True)
    (expected,) = torch.autograd.grad(spread_rows(x, order // top), x, y.double())
    if added is not None:
        expected = expected + added.double()
    assert_near(gather_rows(y, places, added, impl=impl), expected, slack=2)
