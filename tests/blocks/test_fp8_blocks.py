"""Blocks on fp8 weights: what producers quantise along the way is what the products would have quantised themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pronghorn.blocks import AttentionBlock, GluBlock, joining
from pronghorn.blocks import norm as norm_module
from pronghorn.blocks.attention import AttentionSaves
from pronghorn.blocks.glu import GluSaves
from pronghorn.blocks.projection import GradientSink, LinearProjection, ProjectionGroup
from pronghorn.kernels.attention import AttentionCall, Documents
from pronghorn.weights import Fp8Linear, lay_side_by_side, operand, read_weight
from tests.blocks.test_projection_blocks import DEVICE, HEAD, HEADS, HIDDEN, KV, T, group, norm, normal

INNER = 48


def in_fp8(found: ProjectionGroup, stacks: bool) -> ProjectionGroup:
    """The same group on fp8 weights, side by side or not."""
    modules = []
    for projection in found.projections:
        linear = nn.Linear(*projection.weight.shape[::-1], bias=False)
        linear.weight = nn.Parameter(projection.weight.dense(torch.float32), requires_grad=False)
        modules.append(Fp8Linear.of(linear))
        modules[-1].keep_transposed(True)
    if stacks:
        lay_side_by_side(modules)
    projections = [
        LinearProjection(read_weight(module), None, projection.adapters)
        for module, projection in zip(modules, found.projections, strict=True)
    ]
    return ProjectionGroup(projections, found.packed, impl=found.impl)


def without_producers(monkeypatch) -> None:
    """Nobody hands codes or maxima on: the products make everything from the tensors."""
    plain = norm_module.Norm.forward
    monkeypatch.setattr(
        norm_module.Norm, "forward", lambda self, *a, fp8=False, **more: plain(self, *a, **more)
    )
    monkeypatch.setattr(joining, "ROW_MAX_FORWARD", False)
    monkeypatch.setattr(joining, "ROW_MAX_BACKWARD", False)


@pytest.mark.parametrize("level", ["none", "attention", "matmuls", "all"])
@pytest.mark.parametrize("ranks", [(4, 4), (0, 0)])
@pytest.mark.parametrize("stacks", [False, True])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_glu_block(level, ranks, stacks, impl, monkeypatch):
    results = []
    for name in ("ROW_MAX_FORWARD", "ROW_MAX_BACKWARD"):
        monkeypatch.setattr(joining, name, True)
    for alone in (False, True):
        if alone:
            without_producers(monkeypatch)
        gate_up = in_fp8(group(impl, HIDDEN, (INNER, INNER), ranks), stacks)
        down = in_fp8(group(impl, INNER, (HIDDEN,), (4,)), False)
        block, saves = GluBlock(norm(), gate_up, down, "silu"), GluSaves()
        sink = GradientSink(block.trainable())
        with torch.no_grad():
            block.add_residual(normal(T, HIDDEN), normal(T, HIDDEN, seed=1), torch.bfloat16, saves)
            assert (saves.codes is None) is alone
            out = block.forward(torch.bfloat16, level, saves).clone()
            assert saves.codes is None and saves.code_scales is None
            if saves.summed is None:
                block.add_residual(normal(T, HIDDEN), normal(T, HIDDEN, seed=1), torch.bfloat16, saves)
            columns = None if alone else in_fp8(group(impl, INNER, (HIDDEN,), (4,)), False).columns_of_dy()
            dx = block.backward(normal(T, HIDDEN, seed=2), torch.bfloat16, saves, sink, columns)
        # The residual stream is wider than what is multiplied here: nobody's codes would be those of the products.
        assert dx.made is None
        results.append([out, dx.tensor, *sink.gradients])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("stacks", [False, True])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_attention_block(stacks, impl, monkeypatch):
    results = []
    cos, sin = normal(T, HEAD, seed=4).cos(), normal(T, HEAD, seed=4).sin()
    for alone in (False, True):
        if alone:
            without_producers(monkeypatch)
            monkeypatch.setattr(ProjectionGroup, "fp8_columns", lambda self: None)
        qkv = in_fp8(group(impl, HIDDEN, (HEADS * HEAD, KV * HEAD, KV * HEAD), (4, 4, 4)), stacks)
        block = AttentionBlock(
            norm=norm(), qkv=qkv, o=in_fp8(group(impl, HEADS * HEAD, (HIDDEN,), (4,)), False),
            heads=HEADS, kv_heads=KV, head_dim=HEAD, cos=cos, sin=sin,
            docs=Documents(torch.tensor([0, 4, T], dtype=torch.int32, device=DEVICE), 4),
            call=AttentionCall(0.3, None, "sdpa"),
        )  # fmt: skip
        sink, saves = GradientSink(block.trainable()), AttentionSaves()
        x = normal(T, HIDDEN)
        with torch.no_grad():
            block.rebuild(x, torch.bfloat16, saves)
            out = block.output(saves).clone()
            dx = block.backward(normal(T, HIDDEN, seed=2), x, torch.bfloat16, saves, sink, True)
        results.append([out, dx, *sink.gradients])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_the_gradient_goes_on_quantised():
    """From the norm's backward to o: the same gradient with its codes as without."""
    o, results = in_fp8(group("torch", INNER, (HIDDEN,), (0,)), False), []
    for columns in (None, o.columns_of_dy()):
        gate_up = in_fp8(group("torch", HIDDEN, (INNER, INNER), (4, 4)), True)
        block = GluBlock(norm(), gate_up, in_fp8(group("torch", INNER, (HIDDEN,), (4,)), False), "silu")
        saves, x = GluSaves(), normal(T, HIDDEN).to(torch.bfloat16)
        with torch.no_grad():
            block.add_residual(x, x, torch.bfloat16, saves)
            block.forward(torch.bfloat16, "all", saves)
            sink = GradientSink(block.trainable())
            dsummed = block.backward(x, torch.bfloat16, saves, sink, columns)
            assert (dsummed.made is None) is (columns is None)
            made = dsummed.made
            results.append((dsummed.tensor, o.input_grad([dsummed], x, sink)[0]))
            assert made is None or dsummed.made is made
            dsummed.release()
            assert dsummed.made is None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def counted(plain, name, calls):
    def count(*args, **more):
        calls.append((name, more.get("row_max") is not None))
        return plain(*args, **more)

    return count


def test_one_reading_a_group(monkeypatch):
    """With everything handed on, rows are quantised apart only for o and its dY, and dY of down."""
    calls = []
    for name in ("quantise_rows", "quantise_joined"):
        monkeypatch.setattr(operand, name, counted(getattr(operand, name), name, calls))
    gate_up = in_fp8(group("torch", HIDDEN, (INNER, INNER), (4, 4)), True)
    down = in_fp8(group("torch", INNER, (HIDDEN,), (4,)), False)
    block, saves = GluBlock(norm(), gate_up, down, "silu"), GluSaves()
    with torch.no_grad():
        block.add_residual(normal(T, HIDDEN), normal(T, HIDDEN, seed=1), torch.bfloat16, saves)
        block.forward(torch.bfloat16, "all", saves)
        assert calls == [("quantise_rows", joining.ROW_MAX_FORWARD)]
        block.backward(normal(T, HIDDEN, seed=2), torch.bfloat16, saves, GradientSink(block.trainable()))
    assert calls[1:] == [("quantise_rows", False), ("quantise_joined", joining.ROW_MAX_BACKWARD)]
