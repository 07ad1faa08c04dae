"""The gated delta rule in chunks against the recurrence token by token, and its gradients against autograd in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pronghorn.kernels.attention import Documents
from pronghorn.kernels.delta_gates import delta_gates_backward, delta_gates_forward
from pronghorn.kernels.delta_rule import (
    EPS,
    _runs_in_triton,
    delta_rule_backward,
    delta_rule_continued,
    delta_rule_forward,
)
from tests.kernels.compare import assert_near, random

#: lengths of documents (chunks have 64 tokens), heads of q and k, of v, size of k, of v
SHAPES = [((150,), 1, 1, 16, 16), ((5, 0, 70, 1, 64, 40, 0), 2, 4, 16, 32), ((1,), 1, 2, 32, 16)]


def documents(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return packed(lengths, device).document_of_token(sum(lengths))


def packed(lengths: tuple[int, ...], device: torch.device) -> Documents:
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return Documents(bounds, max(lengths))


def inputs(shape: tuple, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    lengths, k_heads, heads, of_k, of_v = shape
    tokens = sum(lengths)
    q, k = (random(tokens, k_heads, of_k, dtype=dtype, device=device, seed=s) for s in (0, 1))
    # Keys that resemble each other: the triangular system is then far from the identity.
    k = k + 2 * k[:1]
    v = random(tokens, heads, of_v, dtype=dtype, device=device, seed=2)
    g = -random(tokens, heads, dtype=torch.float32, device=device, seed=3).abs() * 0.3
    beta = random(tokens, heads, dtype=torch.float32, device=device, seed=4).mul(2).sigmoid()
    return [q, k, v, *(x.to(torch.promote_types(dtype, torch.float32)) for x in (g, beta))]


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + EPS).sqrt()


def oracle(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, document: Tensor) -> Tensor:
    group = v.shape[1] // k.shape[1]
    q, k = (unit(x).repeat_interleave(group, 1) for x in (q, k))
    q = q * q.shape[2] ** -0.5
    outs = []
    for t in range(v.shape[0]):
        if t == 0 or document[t] != document[t - 1]:
            state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2])
        state = state * g[t].exp()[:, None, None]
        delta = beta[t][:, None] * (v[t] - torch.einsum("ndf,nd->nf", state, k[t]))
        state = state + torch.einsum("nd,nf->ndf", k[t], delta)
        outs.append(torch.einsum("ndf,nd->nf", state, q[t]))
    return torch.stack(outs)


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_are_the_recurrence(shape, device):
    """In fp64, where only a wrong formula is seen."""
    given = inputs(shape, torch.float64, device)
    docs = packed(shape[0], device)
    leaves = [x.clone().requires_grad_() for x in given]
    expected = oracle(*leaves, docs.document_of_token(sum(shape[0])))
    assert_near(delta_rule_forward(*given, docs), expected, slack=100.0)
    dout = random(*expected.shape, dtype=torch.float64, device=device, seed=5)
    wanted = torch.autograd.grad(expected, leaves, dout)
    found = delta_rule_backward(dout, *given, docs)
    for actual, want in zip(found, wanted, strict=True):
        assert_near(actual, want, slack=100.0)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_triton(shape, device):
    """In fp32, which the interpreter's products take; several hundred terms in a row of sums."""
    given, docs = inputs(shape, torch.float32, device), packed(shape[0], device)
    wide = [x.double() for x in given]
    expected = delta_rule_forward(*wide, docs)
    assert_near(delta_rule_forward(*given, docs, impl="triton"), expected, slack=4.0)
    dout = random(*expected.shape, dtype=torch.float32, device=device, seed=5)
    wanted = delta_rule_backward(dout.double(), *wide, docs)
    found = delta_rule_backward(dout, *given, docs, impl="triton")
    for actual, want in zip(found, wanted, strict=True):
        assert_near(actual, want, slack=8.0)


@pytest.mark.parametrize("shape", [((70, 1, 128, 3), 2, 4, 16, 32), ((64,), 1, 1, 16, 16)])
def test_parts_give_what_the_whole_gives(shape, device):
    """A first part of each document, then the rest from the state that it left; by torch and by Triton."""
    given, docs = inputs(shape, torch.float64, device), packed(shape[0], device)
    expected = delta_rule_forward(*given, docs)
    firsts = [max(1, length * 2 // 3) for length in shape[0]]
    ends = torch.tensor([0, *shape[0]]).cumsum(0).tolist()
    rows = [torch.arange(at, at + n) for at, n in zip(ends, firsts, strict=False)]
    others = [torch.arange(at + n, end) for at, n, end in zip(ends, firsts, ends[1:], strict=False)]
    for dtype, impl, slack in ((torch.float64, "torch", 100.0), (torch.float32, "triton", 4.0)):
        states = torch.zeros(len(firsts), shape[2], shape[3], shape[4], dtype=dtype, device=device)
        cast = [x.to(dtype) for x in given]
        for part in (rows, others):
            held = [i for i, row in enumerate(part) if len(row)]
            chosen, lengths = torch.cat(part).to(device), [len(part[i]) for i in held]
            before = states[held]
            part_docs = packed(tuple(lengths), device)
            out = delta_rule_continued(*(x[chosen] for x in cast), part_docs, before, impl=impl)
            states[held] = before
            assert_near(out, expected[chosen], slack=slack)


def test_other_sizes_of_heads_run_as_torch(device):
    given = inputs(((9,), 1, 2, 24, 8), torch.float32, device)
    assert not _runs_in_triton(given[0], given[2], "triton")
    docs = packed((9,), device)
    expected = delta_rule_forward(*(x.double() for x in given), docs)
    assert_near(delta_rule_forward(*given, docs, impl="triton"), expected)


def test_the_decay_of_a_document_s_first_token_changes_nothing(device):
    shape = SHAPES[1]
    given, docs = inputs(shape, torch.float64, device), packed(shape[0], device)
    before = delta_rule_forward(*given, docs)
    given[3][5] -= 3.0
    assert torch.equal(before, delta_rule_forward(*given, docs))
    dg = delta_rule_backward(before, *given, docs)[3]
    assert dg[5].abs().max() < 1e-12 < dg[6].abs().min()


def test_gates(device):
    a, b = (random(7, 3, dtype=torch.float64, device=device, seed=s) for s in (0, 1))
    decay, bias = (random(3, dtype=torch.float64, device=device, seed=s) for s in (2, 3))
    leaves = [x.clone().requires_grad_() for x in (a, b, decay, bias)]
    expected = [-leaves[2].exp() * (1 + (leaves[0] + leaves[3]).exp()).log(), 1 / (1 + (-leaves[1]).exp())]
    for actual, want in zip(delta_gates_forward(a, b, decay, bias), expected, strict=True):
        assert_near(actual, want)
    grads = [random(7, 3, dtype=torch.float64, device=device, seed=s) for s in (4, 5)]
    wanted = torch.autograd.grad(expected, leaves, grads)
    for actual, want in zip(delta_gates_backward(*grads, a, b, decay, bias), wanted, strict=True):
        assert_near(actual, want)
