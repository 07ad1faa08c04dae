"""Blocks on int8 weights: adapters and residuals in the products' epilogues, codes from the kernels before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pronghorn.blocks import AttentionBlock, GluBlock
from pronghorn.blocks import norm as norm_module
from pronghorn.blocks.attention import AttentionSaves
from pronghorn.blocks.glu import GluSaves
from pronghorn.blocks.projection import Adapter, GradientSink, LinearProjection, ProjectionGroup
from pronghorn.kernels import fp8, int8, lora
from pronghorn.kernels.attention import AttentionCall, Documents
from pronghorn.weights import DenseWeight, Int8Linear, Operand, read_weight
from tests.blocks.test_projection_blocks import DEVICE, HEAD, HEADS, HIDDEN, KV, T, group, norm, normal

INNER = 48
#: blocks of 64 fit into each of these, so that their input gradient is one product; into none of the attention block
OUTS, APART = (128, 64, 64), (HEADS * HEAD, KV * HEAD, KV * HEAD)


def in_int8(found: ProjectionGroup, copies: int = 2) -> ProjectionGroup:
    """The same group on int8 weights, side by side."""
    linears = []
    for projection in found.projections:
        linear = nn.Linear(*projection.weight.shape[::-1], bias=False)
        linear.weight = nn.Parameter(projection.weight.dense(torch.float32), requires_grad=False)
        linears.append(linear)
    projections = [
        LinearProjection(read_weight(module), projection.bias, projection.adapters)
        for module, projection in zip(
            Int8Linear.group(linears, copies=copies), found.projections, strict=True
        )
    ]
    return ProjectionGroup(projections, found.packed, impl=found.impl)


def dequantised(found: ProjectionGroup) -> ProjectionGroup:
    """The same group on the values that the int8 weights stand for."""
    projections = [
        LinearProjection(DenseWeight(p.weight.dense(torch.float32)), p.bias, p.adapters)
        for p in found.projections
    ]
    return ProjectionGroup(projections, found.packed, impl=found.impl)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def without_up(monkeypatch) -> None:
    def refuse(*args, **more):
        raise AssertionError("the adapter took a launch of its own")

    monkeypatch.setattr(lora, "up", refuse)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (0, 8, 0), (0, 0, 0)])
def test_a_group_is_the_formula_from_its_codes(copies, ranks, monkeypatch):
    """Forward and input gradient with the operands rounded as the codes are; the rest in fp32."""
    without_up(monkeypatch)
    found = in_int8(group("torch", HIDDEN, OUTS, ranks), copies)
    x, dys = normal(T, HIDDEN), [normal(T, out, seed=2) for out in OUTS]
    weights = [p.weight for p in found.projections]
    adapters = [p.adapters[0] if p.adapters else None for p in found.projections]
    ys, xa = found.forward(x, defer_adapters=True)
    assert all(found.deferred(i, xa) is None for i in range(3)) and (xa is None) == (sum(ranks) == 0)
    codes, scales = int8.quantise_rows(x, rotated=True)
    for y, weight, adapter in zip(ys, weights, adapters, strict=True):
        expected = (codes.float() * scales) @ (weight.codes.float() * weight.scales).t()
        if adapter is not None:
            expected = expected + adapter.scaling * x @ adapter.a.t() @ adapter.b.t()
        assert error(y, expected) < 1e-5

    sink = GradientSink(found.trainable())
    dx, grads = found.input_grad(dys, x, sink, xa=xa)
    found.parameter_grads(dys, x, xa, grads, sink)
    wide = torch.cat(dys, 1)
    if copies == 2:
        codes, scales = int8.quantise_rows(wide, rotated=True)
        back, factors = found.stack.back
        expected = (codes.float() * scales) @ (back.float() * factors).t()
    else:
        codes, scales = int8.quantise_rows(wide, found.stack.scales)
        expected = int8.rotate((codes.float() * scales) @ found.stack.codes.float())
    for dy, adapter in zip(dys, adapters, strict=True):
        if adapter is not None:
            expected = expected + adapter.scaling * dy @ adapter.b @ adapter.a
    assert error(dx, expected) < 1e-5
    assert all(gradient is not None for gradient in sink.gradients)


@pytest.mark.parametrize("rank", [4, 80])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_does_not_fit_the_epilogue_is_added_after(rank, dropout):
    """Ranks of more than 64 in forward and in sum, dropout in backward: the plain way gives the same sums."""
    pairs = [(normal(rank, HIDDEN, seed=i), normal(16, rank, seed=i + 5)) for i in range(2)]
    plain = [
        LinearProjection(DenseWeight(normal(16, HIDDEN, seed=i + 9)), None, (Adapter(a, b, 0.3, dropout, 7),))
        for i, (a, b) in enumerate(pairs)
    ]
    found = in_int8(ProjectionGroup(plain, impl="torch"))
    assert found.fuses is (rank == 4)
    other = dequantised(found)
    x, dys = normal(T, HIDDEN), [normal(T, 16, seed=i) for i in (2, 3)]
    for y, expected in zip(found.forward(x)[0], other.forward(x)[0], strict=True):
        assert error(y, expected) < 0.02
    sink = GradientSink([])
    assert error(found.input_grad(dys, x, sink)[0], other.input_grad(dys, x, sink)[0]) < 0.02


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [(4,), (0,)])
def test_a_residual_in_place_and_anew_are_the_same(ranks, bias, monkeypatch):
    without_up(monkeypatch)
    found = in_int8(group("torch", HIDDEN, (INNER,), ranks))
    if bias:
        (one,) = found.projections
        found = ProjectionGroup([LinearProjection(one.weight, normal(INNER, seed=8), one.adapters)])
    x, residual = normal(T, HIDDEN).bfloat16(), normal(T, INNER, seed=3).bfloat16()
    anew, xa = found.forward_residual(residual, x)
    out = residual.clone()
    again = found.forward_add_(out, x)
    assert torch.equal(out, anew) and anew.data_ptr() != residual.data_ptr()
    assert (xa is None and again is None) or torch.equal(xa, again)
    # A residual stream in fp32.
    wide, wide_out = residual.float(), residual.float()
    found.forward_add_(wide_out, x)
    assert torch.equal(found.forward_residual(wide, x)[0], wide_out) and wide_out.dtype == torch.float32


def run_glu(level: str, copies: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    gate_up = in_int8(group("torch", HIDDEN, (INNER, INNER), (4, 4)), copies)
    down = in_int8(group("torch", INNER, (HIDDEN,), (4,)), copies)
    block, saves = GluBlock(norm(), gate_up, down, "silu"), GluSaves()
    sink = GradientSink([t for t in block.trainable() if t is not block.norm.weight])
    x, branch = (normal(T, HIDDEN, seed=seed).to(dtype) for seed in (0, 1))
    with torch.no_grad():
        block.add_residual(x, branch, dtype, saves)
        out = block.forward(dtype, level, saves).clone()
        assert saves.codes is None and saves.code_scales is None
        if saves.summed is None:
            block.add_residual(x, branch, dtype, saves)
        columns = in_int8(group("torch", HIDDEN, (HIDDEN,), (0,)), copies).columns_of_dy()
        dy = normal(T, HIDDEN, seed=2).to(dtype)
        dx = block.backward(dy, dtype, saves, sink, columns)
    assert (dx.made is not None) == (copies == 2)
    return [out, dx.tensor, *sink.gradients]


@pytest.mark.parametrize("copies", [1, 2])
def test_glu_block_is_the_same_at_every_level(copies):
    results = [run_glu(level, copies) for level in ("none", "attention", "matmuls", "all")]
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])
        # Gradients of B come out of another product where XA is not kept.
        assert all(error(one, two) < 0.01 for one, two in zip(results[0][2:], other[2:], strict=True))


def test_tiles_are_rebuilt_by_the_kernels_that_made_them(monkeypatch):
    """A norm that hands on codes sums in another order than the plain one."""
    calls = []
    plain = norm_module.Norm.forward

    def counted(self, *args, int8=False, **more):
        calls.append(int8)
        return plain(self, *args, int8=int8, **more)

    monkeypatch.setattr(norm_module.Norm, "forward", counted)
    for tiles, expected in ((1, [True, True]), (2, [False, False, False])):
        found = [slice(0, 4), slice(4, T)] if tiles == 2 else [slice(0, T)]
        monkeypatch.setattr(GluBlock, "tiles", lambda self, tokens, found=found: found)
        block = GluBlock(
            norm(),
            in_int8(group("torch", HIDDEN, (INNER, INNER), (4, 4))),
            in_int8(group("torch", INNER, (HIDDEN,), (4,))),
            "silu",
        )
        saves, x = GluSaves(), normal(T, HIDDEN)
        calls.clear()
        with torch.no_grad():
            block.add_residual(x, x, torch.float32, saves)
            block.forward(torch.float32, "attention", saves)
            block.backward(x, torch.float32, saves, GradientSink([]))
        assert calls == expected


@pytest.mark.parametrize("copies", [1, 2])
def test_kernels_and_reference_agree(copies, monkeypatch):
    """Everything that has to do with codes in Triton (in fp32: its interpreter cuts bf16 off); a number in the middle
    of two codes may fall to either."""
    pytest.importorskip("triton")
    expected = run_glu("all", copies, torch.float32)
    for module, name in ((int8, "multiplies_in_triton"), (fp8, "use_triton")):
        monkeypatch.setattr(module, name, lambda tensor, impl: impl != "torch")
    found = run_glu("all", copies, torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < 1e-3


@pytest.mark.parametrize("copies", [1, 2])
def test_codes_of_producers_are_those_of_products(copies, monkeypatch):
    """Where the norm's codes are thrown away everything is quantised from the tensors."""
    results = []
    cos, sin = normal(T, HEAD, seed=4).cos(), normal(T, HEAD, seed=4).sin()
    plain = norm_module.Norm.forward

    def without_codes(self, *args, **more):
        normed, summed = plain(self, *args, **more)
        assert normed.made is not None
        return Operand(normed.tensor), summed

    for alone in (False, True):
        if alone:
            monkeypatch.setattr(norm_module.Norm, "forward", without_codes)
        qkv = in_int8(group("torch", HIDDEN, APART, (4, 4, 4)), copies)
        o = in_int8(group("torch", APART[0], (HIDDEN,), (4,)), copies)
        documents = Documents(torch.tensor([0, 4, T], dtype=torch.int32, device=DEVICE), 4)
        block = AttentionBlock(
            norm=norm(), qkv=qkv, o=o, heads=HEADS, kv_heads=KV, head_dim=HEAD, cos=cos, sin=sin,
            docs=documents, call=AttentionCall(0.3, None, "sdpa"),
        )  # fmt: skip
        sink, saves = GradientSink(block.trainable()), AttentionSaves()
        x = normal(T, HIDDEN)
        with torch.no_grad():
            block.rebuild(x, torch.float32, saves)
            out = block.output(saves).clone()
            dx = block.backward(normal(T, HIDDEN, seed=2), x, torch.float32, saves, sink, True)
        results.append([out, dx, *sink.gradients])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
