"""Packed attention against a dense masked reference in fp64, for every implementation this machine has."""

from __future__ import annotations

import pytest
import torch

from pronghorn.errors import AttentionUnavailable
from pronghorn.kernels.attention import BACKENDS, AttentionCall, Documents, attention_forward, choose_backend
from tests.kernels.attention_reference import Case, assert_as_good

MIXED = (37, 1, 130, 64, 0, 2)
CASES = {
    "mixed-gqa": Case((5, 1, 9), 4, 2, 16),
    "equal": Case((8, 8, 8), 4, 4, 32),
    "window": Case((17, 3), 6, 2, 64, window=4),
    "wide-window": Case((12,), 2, 1, 128, window=100),
    "empty-documents": Case((0, 7, 0, 6, 0, 0, 0), 4, 2, 64),
    "one-token": Case((1,), 2, 1, 64),
    "one-token-documents": Case((1, 1, 1, 5, 1), 4, 1, 64),
    "blocks": Case(MIXED, 4, 2, 64),
    "blocks-window": Case(MIXED, 2, 1, 128, window=50),
    "head-80": Case(MIXED, 4, 1, 80),
    "head-96": Case(MIXED, 2, 2, 96),
    "head-100": Case((5, 1, 9), 2, 1, 100),
    "head-128": Case(MIXED, 4, 2, 128),
    "head-256": Case(MIXED, 2, 1, 256),
    "head-256-window": Case(MIXED, 2, 1, 256, window=50),
    "one-length": Case((128, 128, 128), 4, 2, 64),
    "one-length-window": Case((256, 256), 4, 1, 128, window=50),
    "one-length-256-sinks": Case((128, 128), 2, 2, 256, sinks=True),
    "sinks": Case((7, 0, 140), 4, 2, 64, sinks=True),
    "sinks-window": Case((7, 40), 4, 2, 64, window=8, sinks=True),
    "softcap": Case((7, 0, 140), 4, 2, 64, softcap=2.0),
    "softcap-window-sinks": Case((7, 40), 4, 2, 64, window=8, softcap=2.0, sinks=True),
    "images": Case((9, 0, 140, 5), 4, 2, 64, blocks=((0, 4), (12, 60), (61, 140), (149, 154))),
    "images-window-sinks": Case((9, 140), 4, 2, 64, window=30, blocks=((0, 4), (9, 109)), sinks=True),
}


def skip_unless_here(backend: str, case: Case, dtype: torch.dtype, device: torch.device) -> None:
    try:
        choose_backend(
            device,
            dtype,
            case.head_dim,
            window=case.window is not None,
            softcap=case.softcap is not None,
            sinks=case.sinks,
            both_ways=bool(case.blocks),
            wanted=backend,
        )
    except AttentionUnavailable as reason:
        pytest.skip(reason.message)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_gradients(case: Case, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    skip_unless_here(backend, case, dtype, device)
    if backend == "flex" and dtype == torch.float64:
        pytest.skip("FlexAttention's kernels know no fp64")
    exact = case.inputs(dtype, device)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(exact[0].shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
    low = [x.detach().to(dtype).requires_grad_() for x in exact]
    ours = case.ours(backend, low, dout, case.documents(device))
    assert_as_good(ours, case.truth(low, dout), case.truth(exact, dout))


@pytest.mark.parametrize("backend", ["cudnn", "flash", "flex", "cpu", "sdpa", "eager"])
def test_views_of_a_wider_buffer(backend: str, device: torch.device) -> None:
    """q, k and v as columns of one projection's output give what contiguous ones give."""
    case = Case((33, 0, 7), 4, 2, 64)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    skip_unless_here(backend, case, dtype, device)
    parts = [x.detach().to(dtype) for x in case.inputs(dtype, device)]
    wide = torch.cat([x.flatten(1) for x in parts], dim=1)
    views = [
        x.view(p.shape) for x, p in zip(wide.split([p[0].numel() for p in parts], 1), parts, strict=True)
    ]
    dout = torch.ones_like(parts[0])
    docs = case.documents(device)
    plain, viewed = (case.ours(backend, inputs, dout, docs) for inputs in (parts, views))
    for name in plain:
        torch.testing.assert_close(viewed[name], plain[name], msg=name)
        assert viewed[name].is_contiguous(), name


@pytest.mark.parametrize("backend", ["cudnn", "flash", "cpu", "sdpa", "eager"])
def test_trailing_empty_documents_change_nothing(backend: str, device: torch.device) -> None:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    bare, padded = Case((33, 5, 64), 2, 1, 64), Case((33, 5, 64, *([0] * 13)), 2, 1, 64)
    skip_unless_here(backend, bare, dtype, device)
    inputs = [x.detach().to(dtype) for x in bare.inputs(dtype, device)]
    call = AttentionCall(bare.scale, None, backend)
    outs = [attention_forward(*inputs, case.documents(device), call)[0] for case in (bare, padded)]
    assert torch.equal(*outs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("strict", [False, True], ids=["default", "deterministic"])
@pytest.mark.parametrize("backend", ["cudnn", "flash", "flex"])
def test_captured_as_eager(backend: str, strict: bool, device: torch.device) -> None:
    """A replay gives an eager pass's numbers, also after the documents have changed in place."""
    case = Case((300, 1, 130, 0, 81), 4, 2, 128, softcap=20.0 if backend == "flex" else None)
    skip_unless_here(backend, case, torch.bfloat16, device)
    inputs = [x.detach().bfloat16() for x in case.inputs(torch.bfloat16, device)]
    dout = torch.ones_like(inputs[0])
    cu = case.documents(device).cu_seqlens

    def run() -> dict[str, torch.Tensor]:
        return case.ours(backend, inputs, dout, Documents(cu, 512))

    torch.use_deterministic_algorithms(strict)
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = run()
        for lengths in ((300, 1, 130, 0, 81), (12, 500, 0, 0, 0)):
            cu.copy_(torch.tensor((0, *lengths)).cumsum(0))
            graph.replay()
            eager = run()
            assert torch.equal(held["out"], eager["out"]), lengths
            for name in ("dq", "dk", "dv"):
                if strict and backend != "flex":
                    assert torch.equal(held[name], eager[name]), (name, lengths)
                else:
                    torch.testing.assert_close(held[name], eager[name], rtol=2e-2, atol=2e-2, msg=name)
    finally:
        torch.use_deterministic_algorithms(False)
