"""Stacks of experts in 4 bits: single experts out of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pronghorn.weights.experts import held_stack, hold_in_four_bits
from tests.kernels.compare import random


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(5, 48, 64), (7, 64, 128)], ids=str)
def test_single_experts_are_those_of_the_stack(double, quant_type, shape):
    """The scales' own blocks of 256 may begin in one expert and end in the next."""
    pytest.importorskip("bitsandbytes")
    module = nn.Module()
    module.down_proj = nn.Parameter(random(*shape, dtype=torch.float32, device="cpu") * 0.1)
    hold_in_four_bits(module, "down_proj", quant_type, double)
    stack = held_stack(module, "down_proj")
    chosen = torch.tensor([4, 0, 4, 2])
    assert stack.has_whole_blocks
    assert torch.equal(stack.dense_of(chosen, torch.float32), stack.dense(torch.float32)[chosen])


def test_experts_that_share_a_block():
    pytest.importorskip("bitsandbytes")
    module = nn.Module()
    module.down_proj = nn.Parameter(random(4, 6, 8, dtype=torch.float32, device="cpu"))
    hold_in_four_bits(module, "down_proj", "nf4", False)
    assert not held_stack(module, "down_proj").has_whole_blocks
