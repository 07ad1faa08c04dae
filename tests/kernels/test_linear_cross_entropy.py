"""Chunked linear cross-entropy against autograd over full fp64 logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pronghorn.kernels.linear_cross_entropy import default_chunk_rows, linear_cross_entropy
from tests.kernels.compare import IMPLS, assert_near, random

ROWS, HIDDEN, VOCABULARY, RANK = 11, 24, 5000, 4


def make(dtype, device, lora=False, bias=False):
    tensors = {
        "hidden": random(ROWS, HIDDEN, dtype=dtype, device=device),
        "weight": random(VOCABULARY, HIDDEN, dtype=dtype, device=device, seed=1, scale=0.5),
    }
    if bias:
        tensors["bias"] = random(VOCABULARY, dtype=dtype, device=device, seed=2)
    if lora:
        tensors["a"] = random(RANK, HIDDEN, dtype=dtype, device=device, seed=3, scale=0.3)
        tensors["b"] = random(VOCABULARY, RANK, dtype=dtype, device=device, seed=4, scale=0.3)
    labels = torch.randint(VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(5)).to(device)
    labels[2] = labels[7] = -100
    return {name: t.requires_grad_() for name, t in tensors.items()}, labels


def oracle(tensors, labels, scaling, normalizer, logit_scale, softcap):
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    logits = F.linear(wide["hidden"], wide["weight"], wide.get("bias"))
    if "a" in wide:
        logits = logits + scaling * (wide["hidden"] @ wide["a"].T) @ wide["b"].T
    logits = logits * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    total = F.cross_entropy(logits, labels, reduction="sum")
    loss = total / (normalizer or (labels != -100).sum())
    loss.backward()
    return loss.detach(), {name: t.grad for name, t in wide.items()}, logits.detach()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lora,bias", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("logit_scale,softcap", [(1.0, None), (0.25, None), (1.0, 5.0), (0.5, 3.0)])
@pytest.mark.parametrize("normalizer,chunk_rows", [(None, None), (37, 4)])
def test_fp32_is_exact(impl, lora, bias, logit_scale, softcap, normalizer, chunk_rows, device):
    tensors, labels = make(torch.float32, device, lora, bias)
    loss, correct = linear_cross_entropy(
        tensors["hidden"],
        tensors["weight"],
        labels,
        bias=tensors.get("bias"),
        lora=(tensors["a"], tensors["b"], 0.7) if lora else None,
        normalizer=normalizer,
        logit_scale=logit_scale,
        softcap=softcap,
        chunk_rows=chunk_rows,
        impl=impl,
    )
    (2.0 * loss).backward()
    expected, grads, logits = oracle(tensors, labels, 0.7, normalizer, logit_scale, softcap)
    assert_near(loss.detach(), expected)
    assert correct.item() == (logits.argmax(-1) == labels).sum().item()
    for name, tensor in tensors.items():
        assert_near(tensor.grad, 2.0 * grads[name], slack=4)
    assert (tensors["hidden"].grad[[2, 7]] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_16_bit_error_is_that_of_16_bit_logits(impl, dtype, softcap, device):
    tensors, labels = make(dtype, device, lora=True, bias=True)
    loss, _ = linear_cross_entropy(
        tensors["hidden"],
        tensors["weight"],
        labels,
        bias=tensors["bias"],
        lora=(tensors["a"], tensors["b"], 0.7),
        softcap=softcap,
        chunk_rows=3,
        impl=impl,
    )
    loss.backward()
    expected, grads, logits = oracle(tensors, labels, 0.7, None, 1.0, softcap)
    unit = torch.finfo(dtype).eps
    # A logit is rounded a few times; the loss moves by as much as the label's logit and the mean of the others do.
    assert abs(loss.item() - expected.item()) <= 2 * unit * logits.abs().max().item()
    for name, tensor in tensors.items():
        error = (tensor.grad.double() - grads[name]).norm() / grads[name].norm()
        # dlogits carries the logits' absolute error as a relative one, plus its own rounding and the product's.
        assert error <= 2 * unit * (logits.std().item() + 2), name


@pytest.mark.parametrize("impl", IMPLS)
def test_hits_are_counted(impl, device):
    hidden = torch.eye(4, device=device)
    labels = torch.tensor([0, 1, 3, -100], device=device)
    _, correct = linear_cross_entropy(hidden, torch.eye(4, device=device) * 9, labels, impl=impl)
    assert correct.item() == 2 and not correct.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows_and_no_supervised_row(impl, device):
    weight = random(8, 4, dtype=torch.float32, device=device)
    for rows in (0, 3):
        hidden = torch.ones(rows, 4, device=device, requires_grad=True)
        labels = torch.full((rows,), -100, device=device)
        loss, correct = linear_cross_entropy(hidden, weight, labels, impl=impl)
        loss.backward()
        assert loss.item() == 0.0 and correct.item() == 0
        assert torch.equal(hidden.grad, torch.zeros(rows, 4, device=device))


def test_frozen_weights_get_no_buffers_and_no_gradient(device):
    tensors, labels = make(torch.float32, device)
    tensors["weight"].requires_grad_(False)
    loss, _ = linear_cross_entropy(tensors["hidden"], tensors["weight"], labels)
    loss.backward()
    assert tensors["weight"].grad is None and tensors["hidden"].grad is not None
    with torch.no_grad():
        again, _ = linear_cross_entropy(tensors["hidden"], tensors["weight"], labels)
    assert again.item() == loss.item() and not again.requires_grad


def test_normalizer_may_be_a_tensor_anywhere(device):
    tensors, labels = make(torch.float32, device)
    losses = [
        linear_cross_entropy(tensors["hidden"], tensors["weight"], labels, normalizer=n)[0].item()
        for n in (9, torch.tensor(9), torch.tensor(9.0, device=device))
    ]
    assert losses[0] == losses[1] == losses[2]


def test_gradcheck(device):
    hidden = random(5, 4, dtype=torch.float64, device=device).requires_grad_()
    weight = random(7, 4, dtype=torch.float64, device=device, seed=1).requires_grad_()
    labels = torch.tensor([1, -100, 0, 6, 6], device=device)

    def run(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, softcap=2.0, chunk_rows=2)[0]

    assert torch.autograd.gradcheck(run, (hidden, weight))


def test_chunks_are_bounded():
    rows = default_chunk_rows(128256, 2, "cuda")
    assert rows % 128 == 0 and rows * 128256 * 2 <= 128 * 2**20
    assert default_chunk_rows(10**9, 4, "cpu") == 16
    assert (
        default_chunk_rows(128256, 2, "cuda", "roomy")
        >= 1024
        > rows
        > default_chunk_rows(128256, 2, "cuda", "short")
        >= 128
    )
    assert default_chunk_rows(128256, 2, "cpu", "roomy") == default_chunk_rows(128256, 2, "cpu")


def test_the_upstream_factor_is_not_rounded_to_16_bits(device):
    """backward's factor 1/515 lies 0.2 % from its bf16 neighbour, which would be in every gradient alike.

    The rounding of the result is the other way round and random: over 4,096 values their mean is within 2⁻⁹/√4096.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 64, generator=generator).bfloat16().to(device).requires_grad_()
    weight = torch.randn(320, 64, generator=generator).bfloat16().to(device)
    labels = torch.randint(0, 320, (64,), generator=generator).to(device)
    (one,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, normalizer=1)[0], hidden)
    (small,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, normalizer=515)[0], hidden)
    gain = (small.double() * one.double()).sum() / one.double().square().sum() * 515
    assert abs(gain.item() - 1) < 2**-12


@pytest.mark.parametrize("vocabulary", [32000, 50257])
def test_a_head_large_enough_for_tiles(vocabulary, device):
    """On Hopper the first is multiplied by the kernel of products, the second, whose rows are not aligned, is not."""
    hidden = random(300, 136, dtype=torch.bfloat16, device=device).requires_grad_()
    weight = random(vocabulary, 136, dtype=torch.bfloat16, device=device, seed=1, scale=0.1)
    labels = torch.randint(vocabulary, (300,), generator=torch.Generator().manual_seed(5)).to(device)
    loss, _ = linear_cross_entropy(hidden, weight, labels, chunk_rows=128)
    loss.backward()
    wide = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(wide @ weight.double().t(), labels)
    expected.backward()
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-3, atol=0)
    assert (hidden.grad.double() - wide.grad).norm() < 1e-2 * wide.grad.norm()
