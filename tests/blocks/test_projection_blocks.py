"""Blocks whose adapters are added on the way into the next kernel, against the same blocks that add them at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pronghorn.blocks import AttentionBlock, GluBlock, Norm
from pronghorn.blocks.attention import AttentionSaves
from pronghorn.blocks.glu import GluSaves
from pronghorn.blocks.projection import (
    Adapter,
    GradientSink,
    LinearProjection,
    PackedAdapters,
    ProjectionGroup,
)
from pronghorn.kernels import glu as glu_kernels
from pronghorn.kernels import rope as rope_kernels
from pronghorn.kernels.attention import AttentionCall, Documents
from pronghorn.weights import DenseWeight, join

T, HIDDEN, INNER, HEADS, KV, HEAD = 6, 32, 40, 4, 2, 8
#: Triton's interpreter takes CPU tensors, a GPU's kernels do not.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape))).to(DEVICE)


def group(impl: str, width: int, outs: tuple[int, ...], ranks: tuple[int, ...], packed: bool = False):
    projections, pairs = [], []
    for i, (out, rank) in enumerate(zip(outs, ranks, strict=True)):
        pair = (normal(rank, width, seed=i).requires_grad_(), normal(out, rank, seed=i + 5).requires_grad_())
        adapters = (Adapter(*pair, 0.3 + i),) if rank else ()
        pairs += [pair] if rank else []
        projections.append(
            LinearProjection(DenseWeight(normal(out, width, seed=i + 9) * 0.2), None, adapters)
        )
    together = None
    if packed:
        a, bs = torch.cat([a.detach() for a, _ in pairs]), tuple(b.detach() for _, b in pairs)
        together = PackedAdapters(a, bs, torch.ones_like(a), tuple(torch.ones_like(b) for b in bs))
    return ProjectionGroup(projections, together, impl=impl)  # type: ignore[arg-type]


def joined(found: ProjectionGroup) -> ProjectionGroup:
    """The same group with its weights side by side."""
    with torch.no_grad():
        assert join([projection.weight for projection in found.projections])
    assert found.stack is not None
    return found


def gradients(*groups: ProjectionGroup) -> list[Tensor]:
    """What went into the packed buffers."""
    held = [g.packed for g in groups if g.packed is not None]
    return [t for packed in held for t in (packed.a_grad, *packed.b_grad) if t is not None]


def norm() -> Norm:
    return Norm((1 + 0.1 * normal(HIDDEN, seed=3)).requires_grad_(), 1e-6)


@pytest.mark.parametrize("ranks", [(4, 4), (0, 8), (16, 0)])
@pytest.mark.parametrize("level", ["none", "attention", "matmuls", "all"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("stacks", [False, True])
def test_glu_block(ranks, level, packed, kernels, stacks, monkeypatch):
    results = []
    for impl in ("torch", "triton"):
        if kernels and impl == "triton":
            monkeypatch.setattr(glu_kernels, "use_triton", lambda tensor, impl: impl != "torch")
        gate_up = group(impl, HIDDEN, (INNER, INNER), ranks, packed)
        gate_up = joined(gate_up) if stacks and impl == "triton" else gate_up
        down = group(impl, INNER, (HIDDEN,), (4,), packed)
        block = GluBlock(norm(), gate_up, down, "silu")
        sink = GradientSink(block.trainable())
        saves = GluSaves()
        with torch.no_grad():
            block.add_residual(normal(T, HIDDEN), normal(T, HIDDEN, seed=1), torch.float32, saves)
            out = block.forward(torch.float32, level, saves).clone()
            again = GluSaves()
            block.add_residual(normal(T, HIDDEN), normal(T, HIDDEN, seed=1), torch.float32, again)
            if saves.summed is None:
                saves = again
            dx = block.backward(normal(T, HIDDEN, seed=2), torch.float32, saves, sink).tensor
        results.append([out, dx, *(g for g in sink.gradients if g is not None), *gradients(gate_up, down)])
    for one, two in zip(*results, strict=True):
        # fp32 sums of a few hundred terms in another order.
        assert (one - two).abs().max() <= 1e-5 * two.abs().max()


@pytest.mark.parametrize("ranks", [(4, 4, 4), (8, 0, 2)])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("stacks", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_attention_block(ranks, kernels, stacks, biases, monkeypatch):
    results = []
    cos, sin = normal(T, HEAD, seed=4).cos(), normal(T, HEAD, seed=4).sin()
    for impl in ("torch", "triton"):
        if kernels and impl == "triton":
            monkeypatch.setattr(rope_kernels, "use_triton", lambda tensor, impl: impl != "torch")
        qkv = group(impl, HIDDEN, (HEADS * HEAD, KV * HEAD, KV * HEAD), ranks)
        if biases:
            projections = [
                LinearProjection(p.weight, normal(p.weight.shape[0], seed=8), p.adapters)
                for p in qkv.projections
            ]
            qkv = ProjectionGroup(projections, impl=impl)
        qkv = joined(qkv) if stacks and impl == "triton" else qkv
        block = AttentionBlock(
            norm=norm(), qkv=qkv, o=group(impl, HEADS * HEAD, (HIDDEN,), (4,)),
            heads=HEADS, kv_heads=KV, head_dim=HEAD, cos=cos, sin=sin,
            docs=Documents(torch.tensor([0, 4, T], dtype=torch.int32, device=DEVICE), 4),
            call=AttentionCall(0.3, None, "sdpa"),
        )  # fmt: skip
        sink, saves = GradientSink(block.trainable()), AttentionSaves()
        x = normal(T, HIDDEN)
        with torch.no_grad():
            block.rebuild(x, torch.float32, saves)
            out = block.output(saves).clone()
            dx = block.backward(normal(T, HIDDEN, seed=2), x, torch.float32, saves, sink, True)
        assert saves.q is None
        results.append([out, dx, *sink.gradients])
    for one, two in zip(*results, strict=True):
        # fp32 sums of a few hundred terms in another order, a softmax of them: 1.2e-5 on one of three CPUs.
        assert (one - two).abs().max() <= 4e-5 * two.abs().max()
