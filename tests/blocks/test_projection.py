"""Projection groups against autograd: every gradient, packed and unpacked, storages that add in place and not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pronghorn.blocks.projection import (
    Adapter,
    GradientSink,
    LinearProjection,
    PackedAdapters,
    ProjectionGroup,
)
from pronghorn.weights import DenseWeight, Operand, Weight, join

T, IN = 5, 24
F64 = torch.float64
#: Triton's interpreter takes CPU tensors, a GPU's kernels do not.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class SeparateWeight(Weight):
    """A storage whose product cannot be added in place."""

    label = "quantised"

    def __init__(self, weight):
        self.weight, self.shape = weight, tuple(weight.shape)

    def dense(self, dtype):
        return self.weight.to(dtype)

    def matmul_add_(self, out, x):
        return out.add_(self.matmul(x))

    def matmul_t_add_(self, out, dy):
        return out.add_(self.matmul_t(dy))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return torch.randn(*shape, generator=generator, dtype=F64).to(DEVICE, dtype)


def make_group(outs, ranks, *, weight=DenseWeight, bias=False, packed=True, dtype=F64):
    """A group, its parameters by name, and the packed gradients' buffers."""
    named, projections, a_parts, bs = {}, [], [], []
    for i, (out, rank) in enumerate(zip(outs, ranks, strict=True)):
        adapters = ()
        if rank:
            a, b = normal(rank, IN, seed=i, dtype=dtype), normal(out, rank, seed=i + 9, dtype=dtype)
            named |= {f"a{i}": a.requires_grad_(), f"b{i}": b.requires_grad_()}
            adapters = (Adapter(a, b, 0.5 + i),)
            a_parts.append(a.detach())
            bs.append(b.detach())
        held = weight(normal(out, IN, seed=i + 20, dtype=dtype))
        projections.append(
            LinearProjection(held, normal(out, seed=i, dtype=dtype) if bias else None, adapters)
        )
    adapters_packed = None
    if packed:
        stacked = torch.cat(a_parts)
        adapters_packed = PackedAdapters(
            stacked, tuple(bs), torch.ones_like(stacked), tuple(torch.ones_like(b) for b in bs)
        )
    return ProjectionGroup(projections, adapters_packed), named


def expected_outputs(group: ProjectionGroup, x: Tensor) -> list[Tensor]:
    ys = []
    for p in group.projections:
        y = x @ p.weight.dense(x.dtype).t()
        y = y if p.bias is None else y + p.bias
        for adapter in p.adapters:
            y = y + adapter.scaling * (x @ adapter.a.t()) @ adapter.b.t()
        ys.append(y)
    return ys


def collected(group: ProjectionGroup, named: dict[str, Tensor], sink: GradientSink) -> dict[str, Tensor]:
    """Gradients by name from wherever they went; a packed buffer began at one."""
    if group.packed is None:
        return dict(zip(named, sink.gradients, strict=True))
    assert all(gradient is None for gradient in sink.gradients), "packed gradients do not go to the sink"
    found, row = {}, 0
    assert group.packed.a_grad is not None
    names = [name for name in named if name.startswith("a")]
    for name, grad in zip(names, group.packed.b_grad, strict=True):
        rank = named[name].shape[0]
        found[name] = group.packed.a_grad[row : row + rank] - 1
        found["b" + name[1:]] = grad - 1
        row += rank
    return found


def close(found: Tensor, want: Tensor, name: str = "") -> None:
    unit = 1e-12 if found.dtype == F64 else 2e-6
    assert (found - want).abs().max() <= unit * want.abs().max(), name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weight", [DenseWeight, SeparateWeight])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_xa", [False, True])
@pytest.mark.parametrize("outs,ranks", [((8,), (4,)), ((8, 6, 6), (4, 2, 3)), ((10, 6), (0, 2))])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_outputs_and_every_gradient(packed, weight, bias, with_xa, outs, ranks, impl):
    # The kernels compute in fp32.
    dtype = F64 if impl == "torch" else torch.float32
    group, named = make_group(outs, ranks, weight=weight, bias=bias, packed=packed, dtype=dtype)
    group.impl = impl
    x = normal(T, IN, dtype=dtype).requires_grad_()
    expected = expected_outputs(group, x)
    dys = [normal(T, out, seed=50 + i, dtype=dtype) for i, out in enumerate(outs)]
    truth = torch.autograd.grad(expected, [x, *named.values()], dys)
    with torch.no_grad():
        ys, xa = group.forward(x.detach())
        sink = GradientSink(list(named.values()))
        dx, grads = group.input_grad(dys, x.detach(), sink, xa=xa if with_xa else None)
        group.parameter_grads(dys, x.detach(), xa, grads, sink)
    for y, want in zip(ys, expected, strict=True):
        close(y, want)
    close(dx, truth[0])
    found = collected(group, named, sink)
    for name, want in zip(named, truth[1:], strict=True):
        close(found[name], want, name)


def test_gradients_without_a_kept_xa_and_without_input_gradient():
    group, named = make_group((8, 6), (4, 2))
    x = normal(T, IN)
    dys = [normal(T, 8, seed=1), normal(T, 6, seed=2)]
    truth = torch.autograd.grad(expected_outputs(group, x), list(named.values()), dys)
    sink = GradientSink(list(named.values()))
    with torch.no_grad():
        dx, grads = group.input_grad(dys, x, sink, need=False)
        group.parameter_grads(dys, x, None, grads, sink)
    assert dx is None
    for name, want in zip(named, truth, strict=True):
        torch.testing.assert_close(collected(group, named, sink)[name], want)


@pytest.mark.parametrize("weight", [DenseWeight, SeparateWeight])
@pytest.mark.parametrize("dtypes", [(F64, F64), (F64, torch.float32)])
def test_residual_sum_is_a_new_tensor(weight, dtypes):
    residual_dtype, dtype = dtypes
    group, _ = make_group((8,), (4,), weight=weight, dtype=dtype)
    x, residual = normal(T, IN, dtype=dtype), normal(T, 8, seed=3, dtype=residual_dtype)
    kept = residual.clone()
    with torch.no_grad():
        out, xa = group.forward_residual(residual, x)
        want = residual + expected_outputs(group, x)[0]
    assert out.dtype == residual_dtype and torch.equal(residual, kept)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(xa, (x @ group.packed.a.t()))


@pytest.mark.parametrize("weight", [DenseWeight, SeparateWeight])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_added_in_place_gives_the_same_bits_as_a_new_sum(weight, impl, dtype):
    """Levels that keep the residual sum and levels that overwrite it must agree."""
    group, _ = make_group((8,), (4,), weight=weight, dtype=dtype)
    group.impl = impl
    x, residual = normal(T, IN, dtype=dtype), normal(T, 8, seed=3, dtype=dtype)
    with torch.no_grad():
        new, _ = group.forward_residual(residual, x)
        held = residual.clone()
        group.forward_add_(held, x)
        want = residual.double() + expected_outputs(group, x)[0].double()
    assert torch.equal(new, held)
    unit = 4e-6 if dtype == torch.float32 else 2**-6
    assert (new.double() - want).abs().max() <= unit * want.abs().max()


def test_one_operand_for_a_group():
    """A storage with its own format meets the same operand in every product of the group."""
    met = []

    class Watching(SeparateWeight):
        def matmul(self, x, bias=None):
            met.append(x)
            return super().matmul(x, bias)

    group, _ = make_group((8, 6), (4, 2), weight=Watching)
    operand = Operand(normal(T, IN))
    with torch.no_grad():
        group.forward(operand)
    assert len(met) == 2 and all(x is operand for x in met)


def test_adapters_left_to_the_consumer():
    """Base outputs and what `deferred` gives make the whole; without kernels nothing is left over."""
    group, _ = make_group((8, 6, 6), (4, 0, 3), dtype=torch.float32)
    x = normal(T, IN, dtype=torch.float32)
    want = expected_outputs(group, x)
    with torch.no_grad():
        ys, xa = group.forward(x, defer_adapters=True)
        assert all(group.deferred(i, xa) is None for i in range(3))
        group.impl = "triton"
        bases, xa = group.forward(x, defer_adapters=True)
        parts = [group.deferred(i, xa) for i in range(3)]
    assert parts[1] is None
    for i in range(3):
        torch.testing.assert_close(ys[i], want[i])
        whole = bases[i] if parts[i] is None else parts[i].add_to(bases[i])
        torch.testing.assert_close(whole, want[i])


def recorded(plain, name, shapes):
    def call(self, *args):
        shapes.append((name, self.shape))
        return plain(self, *args)

    return call


@pytest.mark.parametrize("ranks", [(0, 0), (4, 2)])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("bias", [False, True])
def test_weights_side_by_side_are_one_product(ranks, impl, bias, monkeypatch):
    dtype, outs = (F64 if impl == "torch" else torch.float32), (10, 6)
    group, named = make_group(outs, ranks, packed=False, bias=bias, dtype=dtype)
    group.impl = impl
    with torch.no_grad():
        assert join([p.weight for p in group.projections])
    x = normal(T, IN, dtype=dtype).requires_grad_()
    expected = expected_outputs(group, x)
    dys = [normal(T, out, seed=50 + i, dtype=dtype) for i, out in enumerate(outs)]
    truth = torch.autograd.grad(expected, [x, *named.values()], dys)
    shapes = []
    products = {
        name: getattr(DenseWeight, name) for name in ("matmul", "matmul_add_", "matmul_t", "matmul_t_add_")
    }
    for name, plain in products.items():
        monkeypatch.setattr(DenseWeight, name, recorded(plain, name, shapes))
    with torch.no_grad():
        ys, xa = group.forward(x.detach(), defer_adapters=True, joined=True)
        deferring = xa is not None and group.defers(xa)
        sink = GradientSink(list(named.values()))
        dy_columns = list(torch.cat(dys, 1).split(outs, 1))
        dx, grads = group.input_grad(dy_columns, x.detach(), sink, xa=xa)
        group.parameter_grads(dy_columns, x.detach(), xa, grads, sink)
    one = xa is None or deferring
    assert [shape for _, shape in shapes] == [(16, IN)] * (1 if one else 0) + [(10, IN), (6, IN)] * (
        not one
    ) + [(16, IN)]
    for i, (y, want) in enumerate(zip(ys, expected, strict=True)):
        lacking = group.deferred(i, xa) if deferring else None
        close(y if lacking is None else lacking.add_to(y), want.detach(), f"y{i}")
    close(dx, truth[0], "dx")
    for name, found, want in zip(named, sink.gradients, truth[1:], strict=True):
        close(found, want, name)
