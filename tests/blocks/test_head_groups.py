"""Attention's backward over groups of heads gives what it gives over all heads."""

from __future__ import annotations

import pytest
import torch

from pronghorn.blocks import head_groups
from pronghorn.kernels.attention import AttentionCall, Documents, attention_backward, attention_forward
from tests.families.parity import relative_error


def test_number_of_groups() -> None:
    groups = head_groups.head_groups
    assert [groups(t, 8, "flash") for t in (100, 16384, 32768, 65535, 65536, 10**6)] == [1, 1, 2, 2, 4, 8]
    assert groups(100_000, 6, "cudnn") == 6 and groups(80_000, 6, "cudnn") == 3
    assert groups(10**6, 8, "cpu") == 1, "its statistics are not cut by heads"


def case(backend: str, device: torch.device, dtype: torch.dtype, tokens: int) -> None:
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(tokens, 8, 32), (tokens, 4, 32), (tokens, 4, 32), (tokens, 8, 32)]
    q, k, v, dout = (torch.randn(s, dtype=dtype, device=device, generator=generator) for s in shapes)
    lengths = (tokens - 5, 5)
    bounds = torch.tensor([0, lengths[0], tokens], dtype=torch.int32, device=device)
    docs = Documents(bounds, max(lengths), lengths)
    call = AttentionCall(0.2, None, backend)
    out, lse = attention_forward(q, k, v, docs, call)
    whole = attention_backward(dout, q, k, v, out, lse, docs, call)
    for over in (False, True):
        grouped = head_groups.grouped_attention_backward(dout, q, k, v, out, lse, docs, call, over=over)
        for name, a, b, source in zip("qkv", grouped, whole, (dout, k, v), strict=True):
            # FlashAttention-2 adds up dq in an order that changes from run to run.
            tolerance = {torch.float64: 1e-12}.get(dtype, 1e-4)
            assert relative_error(a, b) < tolerance, f"d{name}"
            assert (a.data_ptr() == source.data_ptr()) == over


@pytest.mark.parametrize("tokens", [48, 100])
def test_groups_change_no_gradient(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_groups, "GROUP_TOKENS", 24)
    case("eager", torch.device("cpu"), torch.float64, tokens)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
def test_groups_change_no_gradient_of_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_groups, "GROUP_TOKENS", 256)
    case("flash", torch.device("cuda"), torch.bfloat16, 1024)
