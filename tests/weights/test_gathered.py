"""Frozen tensors in common buffers: the same objects with the same bytes, each block with a storage of its own."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from pronghorn.weights import (
    blocks_of,
    buffers_of,
    gather,
    keep_in_place,
    read_weight,
    size_of,
    stacked,
    tensors_of,
)
from pronghorn.weights import gathered as module
from pronghorn.weights.experts import held_stack, hold_in_four_bits

IN, OUTS = 24, (16, 8, 8, 5)


def linears() -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(IN, out, dtype=torch.bfloat16) for out in OUTS).requires_grad_(False)


def movable(model: nn.Module) -> set[str]:
    found = {id(tensor) for block in blocks_of(model.parameters()) for tensor in block.tensors}
    return {name for name, parameter in model.named_parameters() if id(parameter) in found}


def test_tensors_are_the_same_objects_with_the_same_bytes(monkeypatch) -> None:
    monkeypatch.setattr(module, "BUFFER", 2048)
    model = linears()
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    groups = [[layer.weight for layer in model[:3]], [layer.bias for layer in model[:3]]]
    blocks = blocks_of(model.parameters(), groups)
    buffers = buffers_of(blocks)
    assert [[block.nbytes for block in buffer] for buffer in buffers] == [[1536, 240, 64], [10]]
    assert [size_of(buffer) for buffer in buffers] == [2048, 256]
    for _ in range(2):  # the second time it is the same blocks
        gather(blocks)
        for name, parameter in model.named_parameters():
            same, values = before[name]
            assert parameter is same and torch.equal(parameter, values) and parameter.is_contiguous()
        stack = stacked([read_weight(layer) for layer in model[:3]])
        assert stack is not None and stack.shape == (32, IN)
        first = [block.tensors[0] for block in buffers[0]]
        assert [(tensor.data_ptr() - first[0].data_ptr()) for tensor in first] == [0, 1536, 1792]
        # Nobody who looks at storages finds another block's in one.
        sizes = {block.tensors[0].untyped_storage().nbytes() for block in blocks}
        assert sizes == {1536, 240, 64, 10} and first[1].storage_offset() == 0
        del stack  # as whoever reads a weight would, it keeps it where it is
        blocks = blocks_of(model.parameters(), groups)


def test_a_block_saved_alone_takes_its_own_bytes() -> None:
    model = linears()
    gather(blocks_of(model.parameters()))
    buffer = io.BytesIO()
    torch.save(model[3].state_dict(), buffer)
    assert torch.equal(torch.load(io.BytesIO(buffer.getvalue()))["weight"], model[3].weight)
    whole = io.BytesIO()
    torch.save(model.state_dict(), whole)
    assert len(whole.getvalue()) - len(buffer.getvalue()) > 1000, "not the whole buffer"


def test_what_others_read_stays_where_it_is() -> None:
    model = linears()
    watched, tied, half, kept = model
    seen = watched.weight.data
    tied.bias = nn.Parameter(watched.bias.data[:8], requires_grad=False)
    half.weight.data = torch.zeros(16, IN, dtype=torch.bfloat16)[8:]
    half.bias.grad = torch.zeros_like(half.bias)
    keep_in_place([kept.weight])
    assert movable(model) == {"1.weight", "3.bias"}
    where = {name: p.data_ptr() for name, p in model.named_parameters()}
    gather(blocks_of(model.parameters()))
    there = {name for name, p in model.named_parameters() if p.data_ptr() == where[name]}
    assert there == where.keys() - {"1.weight", "3.bias"}
    seen += 1
    assert torch.equal(watched.weight, seen)
    del seen
    assert "0.weight" in movable(model)
    shared = linears()
    shared[0].weight = nn.Parameter(torch.zeros(3, 7).t(), requires_grad=False)
    with torch.inference_mode():
        shared[1].weight = nn.Parameter(torch.zeros(2), requires_grad=False)
    assert not movable(shared) & {"0.weight", "1.weight"}
    assert not blocks_of([torch.empty(0)])


def test_what_has_to_make_room_comes_back_to_memory_of_its_own() -> None:
    model, adapter = linears(), nn.Linear(IN, 4)
    values = [p.clone() for p in adapter.parameters()]
    gather(blocks_of(model.parameters()), blocks_of(adapter.parameters()))
    for parameter, value in zip(adapter.parameters(), values, strict=True):
        assert torch.equal(parameter, value) and parameter.requires_grad and parameter.is_leaf
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    adapter(torch.randn(2, IN)).sum().backward()


def test_a_device_without_one_large_piece_gives_pieces(monkeypatch) -> None:
    model = linears()
    values = [p.clone() for p in model.parameters()]
    blocks = blocks_of(model.parameters())
    whole, given = sum(block.aligned for block in blocks), module._bytes

    def refuses(size: int, device: torch.device) -> torch.Tensor:
        if size == whole:
            raise torch.OutOfMemoryError("as the test wants it")
        return given(size, device)

    monkeypatch.setattr(module, "_bytes", refuses)
    gather(blocks)
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))


@pytest.mark.parametrize("double", [False, True])
def test_four_bits_move_with_what_reads_them(double: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    options = {"compress_statistics": double, "quant_type": "nf4"}
    linear = bnb.nn.Linear4bit(64, 32, False, torch.float32, **options)
    linear.weight = bnb.nn.Params4bit(torch.randn(32, 64), requires_grad=False, **options)
    linear.to("cpu")
    weight, values = linear.weight, read_weight(linear).dense(torch.float32)
    state = linear.weight.quant_state
    blocks = blocks_of(tensors_of(linear))
    assert len(blocks) == (6 if double else 3)
    gather(blocks)
    assert linear.weight is weight and weight.quant_state is state
    places = {tensor.data_ptr() - weight.data_ptr() for tensor in (weight, state.absmax, state.code)}
    assert len(places) == 3 and all(place % 256 == 0 and 0 <= place < 4096 for place in places), "one buffer"
    assert torch.equal(read_weight(linear).dense(torch.float32), values)
    x = torch.randn(3, 64)
    assert torch.allclose(linear(x), x @ values.T, atol=1e-5)


def test_stacks_of_experts_in_four_bits_move_too() -> None:
    pytest.importorskip("bitsandbytes")
    experts = nn.Module()
    experts.gate_up = nn.Parameter(torch.randn(3, 8, 64), requires_grad=False)
    hold_in_four_bits(experts, "gate_up", "nf4", False)
    experts.gate_up_packed = experts.gate_up_packed.clone()  # without a GPU it is a view of another tensor
    values = held_stack(experts, "gate_up").dense(torch.float32)
    blocks = blocks_of(tensors_of(experts))
    assert sum(block.nbytes for block in blocks) == 3 * 8 * 64 // 2 + 3 * 8 * 4 + 16 * 4
    gather(blocks)
    assert torch.equal(held_stack(experts, "gate_up").dense(torch.float32), values)
