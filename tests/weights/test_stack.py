"""Plain weights side by side: the same parameters, one product, and whatever moves them apart."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from pronghorn.weights import DenseWeight, join, join_tensors, read_weight, side_by_side, stacked

IN, OUTS = 24, (16, 8, 8)


def modules() -> list[nn.Linear]:
    return [nn.Linear(IN, out, bias=False, dtype=torch.bfloat16).requires_grad_(False) for out in OUTS]


def weights(of: list[nn.Linear]) -> list[DenseWeight]:
    return [read_weight(module) for module in of]  # type: ignore[misc]


def test_joined_weights_are_the_same_parameters_and_one_product():
    group = modules()
    parameters, values = [m.weight for m in group], [m.weight.clone() for m in group]
    assert stacked(weights(group)) is None
    assert join(weights(group)) and join(weights(group))
    assert all(m.weight is p for m, p in zip(group, parameters, strict=True))
    assert all(torch.equal(m.weight, v) for m, v in zip(group, values, strict=True))
    stack = stacked(weights(group))
    assert stack is not None and stack.shape == (32, IN)
    assert torch.equal(stack.dense(torch.bfloat16), torch.cat(values))
    x = torch.randn(5, IN, dtype=torch.bfloat16)
    for y, module in zip(stack.matmul(x).split(OUTS, 1), group, strict=True):
        assert torch.allclose(y, module(x), rtol=2**-7, atol=2**-7)
    # Parts in their order only.
    assert stacked(weights(group)[:2]) is not None and stacked(weights(group)[::-1]) is None


def test_a_merge_in_place_is_seen_and_a_new_weight_ends_the_stack():
    group = modules()
    join(weights(group))
    group[1].weight.data += 1
    stack = stacked(weights(group))
    assert torch.equal(stack.dense(torch.bfloat16)[16:24], group[1].weight)
    group[1].weight.data = group[1].weight.data + 1
    assert stacked(weights(group)) is None
    assert not join(weights(group))  # the others are parts of something now
    group[1].weight = nn.Parameter(torch.zeros(8, IN))
    assert stacked(weights(group)) is None


@pytest.mark.parametrize(
    "apart", [copy.deepcopy, lambda m: m.to(torch.float32), lambda m: m.to(torch.float32).to(torch.bfloat16)]
)
def test_copies_and_casts_stand_alone(apart):
    group = nn.ModuleList(modules())
    join(weights(list(group)))
    values = [m.weight.clone() for m in group]
    moved = list(apart(group))
    assert stacked(weights(moved)) is None
    assert all(torch.equal(m.weight, v.to(m.weight.dtype)) for m, v in zip(moved, values, strict=True))
    assert join(weights(moved))


def test_saving_and_loading():
    group = nn.ModuleList(modules())
    join(weights(list(group)))
    buffer = io.BytesIO()
    torch.save(group.state_dict(), buffer)
    other = nn.ModuleList(modules())
    join(weights(list(other)))
    other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(group, other, strict=True))
    assert stacked(weights(list(other))) is not None


def test_what_is_left_apart():
    trained = modules()
    trained[2].requires_grad_(True)
    assert not join(weights(trained))
    tied = modules()[1:]
    tied[1].weight = tied[0].weight
    assert not join(weights(tied))
    shared = modules()[1:]
    shared[1].weight.data = shared[0].weight.data
    assert not join(weights(shared))
    other = modules()
    other[0].float()
    assert not join(weights(other))
    parts = torch.randn(16, IN).to(torch.bfloat16)
    held = modules()[1:]
    held[0].weight.data = parts[8:]
    assert not join(weights(held)) and not join(weights(held)[:1])
    # Frozen when joined, trained later: the product is no frozen one any more.
    later = modules()
    join(weights(later))
    later[0].requires_grad_(True)
    assert stacked(weights(later)) is None


def test_side_by_side_knows_columns_from_rows():
    wide = torch.arange(24.0).view(4, 6)
    left, right = wide.split(3, 1)
    assert torch.equal(side_by_side([left, right], 1), wide)
    assert side_by_side([right, left], 1) is None
    assert side_by_side([left, right.clone()], 1) is None
    flat = torch.zeros(48)
    first, second = flat[:24].view(4, 6), flat[6:30].view(4, 6)
    assert side_by_side([first, second], 1) is None
    assert side_by_side([flat[:24].view(4, 6), flat[24:].view(4, 6)], 0).shape == (8, 6)


def test_what_could_be_trained_moves_for_answers_where_nobody_else_reads_it() -> None:
    parameters = [nn.Parameter(torch.randn(4, 8)) for _ in range(2)]
    values = [parameter.detach().clone() for parameter in parameters]
    assert not join_tensors(parameters), "a step that trains keeps them where they are"
    alias = nn.Parameter(parameters[0].data)
    assert not join_tensors(parameters, answering=True), "the other would be tied no longer"
    del alias
    parameters[1].grad = torch.zeros(4, 8)
    assert not join_tensors(parameters, answering=True), "it is being trained"
    parameters[1].grad = None
    assert join_tensors(parameters, answering=True)
    assert parameters[0].untyped_storage()._cdata == parameters[1].untyped_storage()._cdata
    assert all(torch.equal(p, value) and p.requires_grad for p, value in zip(parameters, values, strict=True))
