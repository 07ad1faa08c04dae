"""q, k and v with adapters and rotation by one launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn.kernels import tiles
from pronghorn.kernels.dispatch import Impl
from pronghorn.kernels.heads import Heads, rotated_heads, why_not
from pronghorn.kernels.lora import LowRank
from pronghorn.kernels.rope import adapted_rope_


def call_of(
    tokens: int,
    widths: tuple[int, int, int],
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    **others: Any,
) -> Heads:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    hidden, kind = 512, others.pop("kind", dtype)
    angles = torch.randn(tokens, 128, generator=generator)
    bs = (random(widths[0], rank), random(widths[1], rank), random(widths[2], rank))
    given: dict[str, Any] = {
        "x": random(tokens, hidden),
        "weight": random(sum(widths), hidden, scale=hidden**-0.5),
        "widths": widths,
        "xa": random(tokens, 3 * rank),
        "bs": bs,
        "cos": angles.cos().to(device, kind),
        "sin": angles.sin().to(device, kind),
    }
    return Heads(**given | others)


def by_steps(call: Heads) -> list[torch.Tensor]:
    """The product, then what adds adapters and rotates."""
    wide = call.x.double() @ call.weight.double().t()
    parts = [part.view(part.shape[0], -1, 128).clone() for part in wide.split(call.widths, 1)]
    shares = [
        LowRank(part.double(), b.double(), 1.0)
        for part, b in zip(call.xa.split(call.rank, 1), call.bs, strict=True)
    ]
    q, k, v = parts
    adapted_rope_(
        q, k, v, call.cos.double(), call.sin.double(), (shares[0], shares[1], shares[2]), impl="torch"
    )
    return [x.flatten(1) for x in parts]


def test_the_formulas(device: torch.device) -> None:
    call = call_of(40, (512, 256, 256), 8, torch.float32, device)
    for found, want in zip(rotated_heads(call, impl="torch"), by_steps(call), strict=True):
        torch.testing.assert_close(found.double(), want, atol=2e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [8, 16, 32, 64])
@pytest.mark.parametrize(
    "tokens,widths",
    [
        (300, (512, 256, 256)),
        (2100, (1024, 256, 256)),
        (64, (256, 256, 256)),
        (8191, (4096, 1024, 1024)),  # by three groups of warps
    ],
)
def test_on_a_gpu(
    tokens: int, widths: tuple[int, int, int], rank: int, kind: torch.dtype, impl: Impl, device: torch.device
) -> None:
    if tiles.why_not(device, torch.bfloat16) is not None:
        pytest.skip("the kernel runs on Hopper GPUs")
    call = call_of(tokens, widths, rank, torch.bfloat16, device, kind=kind)
    for found, want in zip(rotated_heads(call, impl=impl), by_steps(call), strict=True):
        assert found.is_contiguous() and found.dtype == torch.bfloat16
        # Rounded once: half a unit of the last place, and what sums in fp32 add to that.
        error = (found.double() - want).abs()
        assert (error <= 2.0**-8 * want.abs() + 1e-3).all(), error.max()


def test_what_it_does_not_take(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "why_not", lambda device, dtype: None)
    meta = torch.device("meta")
    right = call_of(8192, (4096, 1024, 1024), 16, torch.bfloat16, meta)
    assert why_not(right) is None
    narrow = call_of(8192, (4096, 128, 128), 16, torch.bfloat16, meta)
    assert "heads of 128" in str(why_not(narrow))
    half = torch.empty(8192, 64, device=meta)
    assert "heads of 64" in str(
        why_not(call_of(8192, (4096, 1024, 1024), 16, torch.bfloat16, meta, cos=half, sin=half))
    )
    odd = call_of(8192, (4096, 1024, 1024), 12, torch.bfloat16, meta)
    assert "multiple of 8" in str(why_not(odd))
    turned = torch.empty(128, 8192, device=meta).t()
    lies = call_of(8192, (4096, 1024, 1024), 16, torch.bfloat16, meta, cos=turned, sin=turned)
    assert "row by row" in str(why_not(lies))
