"""Packed attention against a dense masked reference in fp64, for every implementation this machine has."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.attention import (
    AttentionCall,
    Documents,
    attention_backward,
    attention_forward,
    choose_backend,
)


def reference(q, k, v, lengths, scale, window):
    """softmax(scale · QKᵀ + mask) V with the mask of documents, causality and window written out."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    distance = torch.arange(len(q), device=q.device)[:, None] - torch.arange(len(q), device=q.device)[None]
    allowed = (document[:, None] == document[None]) & (distance >= 0)
    if window is not None:
        allowed &= distance < window
    scores = torch.einsum("tnd,snd->nts", q, k) * scale
    return torch.einsum("nts,snd->tnd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v)


CASES = [
    pytest.param((5, 1, 9), 4, 2, 16, None, id="mixed-gqa"),
    pytest.param((8, 8, 8), 4, 4, 32, None, id="equal"),
    pytest.param((17, 3), 6, 2, 64, 4, id="window"),
    pytest.param((12,), 2, 1, 128, 100, id="wide-window"),
    pytest.param((7, 0, 6, 0), 4, 2, 64, None, id="empty-documents"),
]


@pytest.mark.parametrize("lengths, heads, kv_heads, head_dim, window", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["native", "sdpa"])
def test_forward_and_gradients(lengths, heads, kv_heads, head_dim, window, dtype, backend, device) -> None:
    if device == "cuda" and dtype == torch.float64 and backend == "native":
        pytest.skip("native attention on a GPU is 16-bit")
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    shapes = [(total, heads, head_dim), (total, kv_heads, head_dim), (total, kv_heads, head_dim)]
    exact = [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).to(device).double() for s in shapes
    ]
    exact = [x.requires_grad_() for x in exact]
    dout = torch.randn(total, heads, head_dim, generator=generator, dtype=torch.float64).to(dtype).to(device)
    scale = head_dim**-0.5
    expected = reference(*exact, lengths, scale, window)
    expected_grads = torch.autograd.grad(expected, exact, dout.double())

    low = [x.detach().to(dtype).requires_grad_() for x in exact]
    plain = reference(*low, lengths, scale, window)
    plain_grads = torch.autograd.grad(plain, low, dout)

    cu = torch.tensor((0, *lengths), device=device).cumsum(0).int()
    docs = Documents(cu, max(lengths), lengths)
    name = choose_backend(torch.device(device), dtype, head_dim)[0] if backend == "native" else backend
    call = AttentionCall(scale, window, name)
    inputs = [x.detach() for x in low]
    out, lse = attention_forward(*inputs, docs, call)
    grads = attention_backward(dout, *inputs, out, lse, docs, call)
    for label, actual, eager, truth in zip(
        ("out", "dq", "dk", "dv"),
        (out, *grads),
        (plain, *plain_grads),
        (expected, *expected_grads),
        strict=True,
    ):
        ours = (actual.double() - truth).norm()
        # The eager reference keeps the softmax in the low precision; one rounding of the result is always allowed.
        # In fp32 and fp64 both are near the truth, and only the order of sums differs.
        roundings = 1 if dtype.itemsize == 2 else 8
        rounding = roundings * torch.finfo(dtype).eps * truth.norm()
        assert ours <= 1.2 * (eager.double() - truth).norm() + rounding, label


def test_every_backend_has_a_reason() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        backend, reason = choose_backend(torch.device("cpu"), dtype, 64)
        assert backend == "cpu" and reason


@pytest.mark.parametrize("head_dim", [100, 260])
def test_head_sizes_that_flash_attention_does_not_take(head_dim: int) -> None:
    backend, reason = choose_backend(torch.device("cuda"), torch.bfloat16, head_dim)
    assert backend == "sdpa" and str(head_dim) in reason
