"""FlexAttention: which blocks of a mask hold anything, the forward pass, what is compiled and what happens if not."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from pronghorn.kernels.attention import AttentionCall, attention_backward, attention_forward, flex
from pronghorn.kernels.attention.flex import BLOCK, Programs, block_mask
from tests.kernels.attention_reference import Case

CASES = {
    "causal": Case((300, 0, 156, 1, 100), 4, 2, 32),
    "cut-last-block": Case((64, 200, 37), 2, 1, 32),
    "window": Case((300, 156, 100), 2, 1, 32, window=70),
    "blocks": Case((300, 0, 156, 1, 430), 2, 1, 32, blocks=((0, 40), (300, 456), (500, 857))),
    "blocks-window": Case((600,), 2, 1, 32, window=200, blocks=((0, 400),)),
    "softcap-sinks": Case((130, 20), 4, 2, 32, softcap=3.0, sinks=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_cover_the_mask(case: Case) -> None:
    """Blocks said to be full are; every allowed pair is in a full or a partial block; none is in both."""
    tokens = sum(case.lengths)
    mask = block_mask(case.documents(torch.device("cpu")), tokens, case.window)
    allowed = case.allowed()

    def blocks(counts: torch.Tensor, indices: torch.Tensor) -> set[tuple[int, int]]:
        return {
            (row, int(column))
            for row, count in enumerate(counts[0, 0])
            for column in indices[0, 0, row, :count]
        }

    full = blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    partial = blocks(mask.kv_num_blocks, mask.kv_indices)
    assert not full & partial
    for row in range(-(-tokens // BLOCK)):
        for column in range(-(-tokens // BLOCK)):
            part = allowed[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
            if (row, column) in full:
                assert part.all(), (row, column)
            elif (row, column) not in partial:
                assert not part.any(), (row, column)
    for query in range(0, tokens, 7):
        row = mask.mask_mod(*(torch.tensor(x) for x in (0, 0, query)), torch.arange(tokens))
        assert torch.equal(row, allowed[query]), query


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_as_written_out(case: Case) -> None:
    inputs = [x.detach().float() for x in case.inputs(torch.float32, torch.device("cpu"))]
    docs = case.documents(torch.device("cpu"))
    sinks = inputs[3] if case.sinks else None
    found = {
        name: attention_forward(
            *inputs[:3], docs, AttentionCall(case.scale, case.window, name, case.softcap, sinks)
        )
        for name in ("flex", "eager")
    }
    torch.testing.assert_close(found["flex"][0], found["eager"][0])
    torch.testing.assert_close(found["flex"][1].t(), found["eager"][1])


class Counting:
    """A compiler that compiles nothing and counts what it is asked for, and fractions among the inputs."""

    def __init__(self) -> None:
        self.graphs = self.fractions = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs += 1
        # torch passes a number that it takes for a variable as a tensor of this dtype.
        self.fractions += sum(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in inputs)
        return graph.forward


def test_one_compilation_serves_every_number_of_tokens() -> None:
    """Kinds that differ in numbers alone stay apart, none makes another's numbers variables, none breaks in parts."""
    torch._dynamo.reset()
    counting = Counting()
    programs = Programs(counting)
    kinds = [
        {"softcap": 30.0},
        {"softcap": 5.0, "window": 70},
        {"softcap": 5.0, "window": 20},
        {"blocks": True},
        {"head_dim": 16, "softcap": 30.0},
    ]
    for lengths in ((300, 0, 156), (64, 200, 37, 83), (128,) * 3, (290,)):
        for change in kinds:
            blocks = ((0, lengths[0] // 2),) if change.get("blocks") else ()
            case = Case(lengths, 4, 2, **{"head_dim": 32, **change, "blocks": blocks})  # type: ignore[arg-type]
            q, k, v = (x.detach().float() for x in case.inputs(torch.float32, torch.device("cpu")))
            docs = case.documents(torch.device("cpu"))
            call = AttentionCall(case.scale, case.window, "flex", case.softcap)
            kind = flex._kind(q, k, docs, call)
            inputs = [flex._heads_first(x, False) for x in (q, k, v)]
            out, lse = programs.get(kind)(*flex._arguments(kind, inputs, docs))
            truth, statistics = attention_forward(
                q, k, v, docs, AttentionCall(case.scale, case.window, "eager", case.softcap)
            )
            torch.testing.assert_close(out.squeeze(0).transpose(0, 1), truth)
            torch.testing.assert_close(lse.squeeze(0).t(), statistics)
    assert counting.graphs == len(kinds)
    assert not counting.fractions


@pytest.mark.parametrize("case", [CASES["softcap-sinks"], CASES["blocks-window"]], ids=["sinks", "blocks"])
def test_what_cannot_be_compiled_runs_written_out(
    case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def broken(*arguments: object) -> None:
        tried.append(arguments)
        raise RuntimeError("no kernel for this\nand much more")

    monkeypatch.setattr(flex, "PROGRAMS", Programs())
    monkeypatch.setattr(flex, "_attend", broken)
    inputs = case.inputs(torch.float32, torch.device("cpu"))
    inputs = [x.detach().float() for x in inputs]
    dout = torch.randn_like(inputs[0])
    docs = case.documents(torch.device("cpu"))
    with caplog.at_level(logging.WARNING, logger="pronghorn"):
        ours = case.ours("flex", inputs, dout, docs)
        case.ours("flex", inputs, dout, docs)
    plain = case.ours("eager", inputs, dout, docs)
    assert len(tried) == 1
    assert caplog.records[0].message.endswith("RuntimeError: no kernel for this")
    assert len(caplog.records) == 1
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value)


def test_backward_alone_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU FlexAttention has no backward: its forward's statistics serve the written-out one."""
    monkeypatch.setattr(flex, "PROGRAMS", Programs())
    case = CASES["softcap-sinks"]
    inputs = [x.detach().float() for x in case.inputs(torch.float32, torch.device("cpu"))]
    dout = torch.randn_like(inputs[0])
    docs = case.documents(torch.device("cpu"))
    ours, plain = (case.ours(name, inputs, dout, docs) for name in ("flex", "eager"))
    assert len(flex.PROGRAMS.refused) == 1
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value)


def test_memory_that_ran_out_is_no_reason_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(flex, "PROGRAMS", Programs())
    monkeypatch.setattr(flex, "_attend", full)
    case = CASES["causal"]
    q, k, v = (x.detach().float() for x in case.inputs(torch.float32, torch.device("cpu")))
    docs = case.documents(torch.device("cpu"))
    call = AttentionCall(case.scale, None, "flex")
    with pytest.raises(torch.OutOfMemoryError):
        attention_forward(q, k, v, docs, call)
    with pytest.raises(torch.OutOfMemoryError):
        attention_backward(q, q, k, v, q, q[:, :, 0].t().contiguous(), docs, call)
    assert not flex.PROGRAMS.refused
