"""FlexAttention's masks: which blocks hold anything, and the forward pass, which runs on a CPU too."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.attention.flex import BLOCK, block_mask
from tests.kernels.attention_reference import Case

CASES = {
    "causal": Case((300, 0, 156, 1, 100), 4, 2, 32),
    "cut-last-block": Case((64, 200, 37), 2, 1, 32),
    "window": Case((300, 156, 100), 2, 1, 32, window=70),
    "prefix": Case((300, 0, 156, 1, 430), 2, 1, 32, prefix=(40, 0, 156, 0, 400)),
    "prefix-window": Case((600,), 2, 1, 32, window=200, prefix=(400,)),
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
    from pronghorn.kernels.attention import AttentionCall, attention_forward

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
