"""Linear attention by the gated delta rule in the engine: what a sequence is remembered by has one size, however long
it is, and lies in a slot beside the blocks of keys and values.

A slot holds, in every such layer, the convolution's last W - 1 inputs and the state [N, D, F] in fp32
(`kernels.delta_step`). A sequence takes one when its prompt begins and gives it up with its blocks: the state after
some token says nothing about the one after another token, so a beginning that two prompts share is computed for each,
and a sequence that had to wait is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from pronghorn.blocks.delta_net import DeltaHeads
from pronghorn.inference.projections import Group
from pronghorn.kernels.attention import Documents
from pronghorn.kernels.delta_gates import delta_gates_forward
from pronghorn.kernels.delta_rule import delta_rule_continued
from pronghorn.kernels.delta_step import DeltaWeights, delta_rule_step, short_conv_step
from pronghorn.kernels.dispatch import math_dtype
from pronghorn.kernels.gated_output import gated_output_forward
from pronghorn.kernels.short_conv import short_conv_forward


@dataclass(frozen=True)
class States:
    """One layer's: memory [slots, W - 1, C] in the compute dtype, rule [slots, N, D, F] in fp32."""

    memory: Tensor
    rule: Tensor


@dataclass(frozen=True)
class NewTokens:
    """New tokens of several sequences in one stream.

    Args:
        docs: where each begins and ends, known on the host. slots: int64 [sequences].
        begun: whether the slot remembers tokens before these, by sequence. fresh: bool [sequences], the opposite.
    """

    docs: Documents
    slots: Tensor
    begun: Sequence[bool]
    fresh: Tensor

    def slices(self) -> list[slice]:
        return [slice(*bounds) for bounds in pairwise(accumulate(self.docs.host_lengths(), initial=0))]

    def remembered(self, held: Tensor) -> Tensor:
        """What the slots hold, zero where a sequence begins; a copy."""
        if not any(self.begun):
            return held.new_zeros(len(self.begun), *held.shape[1:])
        found = held[self.slots]
        if all(self.begun):
            return found
        return found.masked_fill_(self.fresh.view(-1, *[1] * (held.dim() - 1)), 0.0)


@dataclass(frozen=True)
class DeltaNet:
    """One layer's linear attention.

    Args:
        gates: projections of b and a; [q | k | v] and z are the layer's other group.
        conv: [C, W], and its bias [C] or None.
        columns: where the elements of [q | k | v | z] and of [b | a] are in what the two groups give; None: in this
            order.
    """

    heads: DeltaHeads
    gates: Group
    conv: Tensor
    conv_bias: Tensor | None
    weights: DeltaWeights
    columns: tuple[Tensor, Tensor] | None

    @staticmethod
    def columns_of(heads: DeltaHeads, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """`columns`, found by taking the columns' own numbers apart."""
        if not heads.by_keys:
            return None
        wide = 2 * (heads.keys * heads.key_dim + heads.values * heads.value_dim)
        numbers = [torch.arange(width, device=device)[None] for width in (wide, 2 * heads.values)]
        qkv, z, b, a = heads.apart(numbers)
        return torch.cat([qkv, z], 1)[0], torch.cat([b, a], 1)[0]

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.gates,)

    def states(self, slots: int, dtype: torch.dtype) -> States:
        """Room for so many sequences, and one for rows that hold none."""
        channels, width = self.conv.shape
        rule = slots + 1, self.heads.values, self.heads.key_dim, self.heads.value_dim
        return States(
            self.conv.new_zeros(slots + 1, width - 1, channels, dtype=dtype),
            self.conv.new_zeros(rule, dtype=math_dtype(dtype)),
        )

    def state_bytes(self, dtype: torch.dtype) -> int:
        """What a sequence takes."""
        channels, width = self.conv.shape
        state = self.heads.values * self.heads.key_dim * self.heads.value_dim
        return channels * (width - 1) * dtype.itemsize + state * math_dtype(dtype).itemsize

    def prefill(self, given: Tensor, gates: Tensor, states: States, tokens: NewTokens) -> Tensor:
        """[T, N·F] of what the groups give for the new tokens; the slots then remember these."""
        x, z, b, a = self._apart(given, gates)
        memory, rule = tokens.remembered(states.memory), tokens.remembered(states.rule)
        y = short_conv_forward(x, self.conv, self.conv_bias, tokens.docs.document_of_token(len(x)))
        slices = tokens.slices()
        for rows, before, begun in zip(slices, memory, tokens.begun, strict=True):
            if begun:
                self._mend_(y[rows], x[rows], before)
        width = memory.shape[1]
        last = [
            x[rows][-width:] if rows.stop - rows.start >= width else torch.cat([before, x[rows]])[-width:]
            for rows, before in zip(slices, memory, strict=True)
        ]
        if width:
            states.memory.index_copy_(0, tokens.slots, torch.stack(last))
        g, beta = delta_gates_forward(a, b, self.weights.decay, self.weights.dt_bias)
        out = delta_rule_continued(*self.heads.split(y), g, beta, tokens.docs, rule)
        states.rule.index_copy_(0, tokens.slots, rule)
        gate = z.reshape(out.shape).contiguous()
        read = gated_output_forward(out, gate, weight=self.weights.norm, eps=self.weights.eps)
        return read.flatten(1)

    def decode(self, given: Tensor, gates: Tensor, states: States, slots: Tensor) -> Tensor:
        """[B, N·F] of what the groups give for one token a row, whose slots are int32 [B]."""
        x, z, b, a = self._apart(given, gates)
        y = short_conv_step(x, self.conv, self.conv_bias, states.memory, slots)
        return delta_rule_step(y, z, b, a, self.weights, states.rule, slots)

    def _apart(self, given: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[q | k | v], z, b and a."""
        if self.columns is not None:
            given, gates = (x.index_select(1, at) for x, at in zip((given, gates), self.columns, strict=True))
        channels = self.conv.shape[0]
        b, a = gates.chunk(2, 1)
        return given[:, :channels], given[:, channels:], b, a

    def _mend_(self, y: Tensor, x: Tensor, before: Tensor) -> None:
        """The convolution of a sequence's first new tokens, which reaches back to what was `before`."""
        width = len(before)
        reaching = torch.cat([before, x[:width]])
        document = torch.zeros(len(reaching), dtype=torch.int32, device=x.device)
        mended = short_conv_forward(reaching, self.conv, self.conv_bias, document)
        y[:width] = mended[width:]
