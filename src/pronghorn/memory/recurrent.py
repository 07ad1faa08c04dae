"""The allocations of layers with linear attention among others, first half.

This follows `blocks.delta_net` and `kernels.triton.delta_rule` line by line, as `memory.schedule` follows the others.
"""

from __future__ import annotations

from pronghorn.blocks import Level, keeps
from pronghorn.blocks.head_groups import groups_of
from pronghorn.kernels.delta_rule import CHUNK
from pronghorn.memory.mixture import MixtureStep
from pronghorn.memory.parts import DeltaShape
from pronghorn.memory.products import Held
from pronghorn.memory.schedule import Step


class RecurrentStep(Step):
    """A step of a model with such layers."""

    _recurrent = False

    @property
    def _delta(self) -> DeltaShape:
        assert self.shape.delta is not None
        return self.shape.delta

    def _layer_forward(self, index: int, level: Level, x: int) -> int:
        self._recurrent = self.shape.is_recurrent(index)
        return super()._layer_forward(index, level, x)

    def _layer_backward(self, index: int, level: Level, dout: int) -> int:
        self._recurrent = self.shape.is_recurrent(index)
        return super()._layer_backward(index, level, dout)

    def _modules_of(self, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        if names[0] in self._delta.names:
            return [(name,) for name in names]
        return super()._modules_of(names)

    def _trim_attention(self, level: Level, saves: Held) -> None:
        super()._trim_attention(level, saves)
        if self._recurrent and not keeps(level, "attention"):
            self._drop(saves, "xa_inputs", *self._kept)

    @property
    def _kept(self) -> tuple[str, ...]:
        """[q | k | v], z, b and a."""
        return "qkv", "z", "b", "a"

    def _attention(self, saves: Held) -> None:
        """`DeltaNetBlock.rebuild`."""
        if not self._recurrent:
            super()._attention(saves)
            return
        shape, t, e = self.shape, self.tokens, self.element
        if "out" in saves:
            return
        names = tuple(self._delta.inputs)
        made = self._operand(names[0], t)
        self._keep(saves, "normed_attention", t * shape.hidden * e)
        self._free(self._new(4 * t))
        self._project(saves, names, "xa_inputs", t, made)
        if names != self._kept:
            given = [saves.pop(name)[0] for name in names]
            for name, width in zip(self._kept, self._widths, strict=True):
                self._keep(saves, name, t * width * e)
            self._free(*given)
        inputs, size = self._rule_inputs(), t * self._delta.wide * e
        if self._groups > 1:
            self._keep(saves, "out", size)
        for _ in range(self._groups):
            made = self._chunks()
            if self._groups > 1:
                made.append(self._new(size // self._groups))
            else:
                self._keep(saves, "out", size)
            self._free(*made)
        self._free(*inputs)

    @property
    def _widths(self) -> tuple[int, ...]:
        delta = self._delta
        return delta.mixed, delta.wide, delta.values, delta.values

    def _rule_inputs(self) -> list[int]:
        """What the convolution gives, g and β."""
        delta, t = self._delta, self.tokens
        return [
            self._new(t * delta.mixed * self.element),
            *(self._new(4 * t * delta.values) for _ in range(2)),
        ]

    @property
    def _groups(self) -> int:
        """In how many groups of heads the rule runs."""
        return groups_of(self.tokens, self._delta.keys)

    def _of_group(self, elements: int, size: int = 0) -> int:
        """Something of a group's heads, by its elements for all heads."""
        return self._new(elements // self._groups * (size or self.element))

    def _chunks(self) -> list[int]:
        """What the rule's forward makes of a group of heads besides its output."""
        delta, t = self._delta, self.tokens
        units = [self._of_group(t * delta.keys * delta.key_dim) for _ in range(2)]
        sums, inverse = self._of_group(t * delta.values, 4), self._of_group(self._count * CHUNK**2)
        values, keys = self._of_group(t * delta.wide), self._of_group(t * delta.values * delta.key_dim)
        states, news = self._of_group(self._state_elements), self._of_group(t * delta.wide)
        return [*units, sums, inverse, values, keys, states, news]

    @property
    def _count(self) -> int:
        """Chunks of all heads."""
        return -(-self.tokens // CHUNK) * self._delta.values

    @property
    def _state_elements(self) -> int:
        return self._count * self._delta.key_dim * self._delta.value_dim

    @property
    def _output_names(self) -> tuple[str, ...]:
        return (self._delta.output,) if self._recurrent else super()._output_names

    def _read_by_o(self) -> int:
        if not self._recurrent:
            return super()._read_by_o()
        return self._new(self.tokens * self._delta.wide * self.element)

    def _attention_backward(self, saves: Held, dout_o: int, need: bool) -> int:
        """`DeltaNetBlock.backward` from the gradient of what o read on."""
        if not self._recurrent:
            return super()._attention_backward(saves, dout_o, need)
        delta, t, e = self._delta, self.tokens, self.element
        dout, dz = self._after(dout_o, [self._new(t * delta.wide * e) for _ in range(2)])
        self._drop(saves, "out", "z")
        inputs = self._rule_inputs()
        joined, dgates = self._rule_backward()
        self._free(*inputs, dout)
        dmixed = self._new(t * delta.mixed * e)
        self._drop(saves, "qkv")
        small = [self._new(t * delta.values * e) for _ in range(2)]
        self._free(joined, *dgates)
        gradients = [dmixed, dz, *small]
        names = tuple(delta.inputs)
        if names != self._kept:
            gradients = [self._new(t * width * e) for width in delta.inputs.values()]
            self._free(dmixed, dz, *small)
        return self._through_norm(saves, names, "xa_inputs", gradients, need)

    def _rule_backward(self) -> tuple[int, list[int]]:
        """`DeltaNetBlock._rule_backward`: the gradient of q, k and v side by side, and those of g and β."""
        delta, t, e = self._delta, self.tokens, self.element
        apart, joined, dgates = self._groups > 1, -1, []
        if apart:
            joined = self._new(t * delta.mixed * e)
            dgates = [self._new(4 * t * delta.values) for _ in range(2)]
        for _ in range(self._groups):
            copied = self._of_group(t * delta.wide) if apart else -1
            made = self._chunks()
            made += [self._of_group(t * delta.wide), self._of_group(self._state_elements)]
            made += [self._of_group(t * delta.values * delta.key_dim) for _ in range(2)]
            gates = [self._of_group(t * delta.values, 4) for _ in range(2)]
            dqkv = [self._of_group(t * delta.wide)]
            dqkv += [self._of_group(t * delta.keys * delta.key_dim) for _ in range(2)]
            self._free(*made, copied)
            if apart:
                self._free(*gates)
            else:
                joined, dgates = self._new(t * delta.mixed * e), gates
            self._free(*dqkv)
        return joined, dgates


class RecurrentMixtureStep(RecurrentStep, MixtureStep):
    """A step of a model with linear attention and mixtures of experts."""
