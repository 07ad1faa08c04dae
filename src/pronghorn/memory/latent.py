"""The allocations of a layer with latent attention, first half.

This follows `blocks.latent_attention` line by line, as `memory.schedule` follows the other blocks.
"""

from __future__ import annotations

from pronghorn.blocks import Level, keeps
from pronghorn.blocks.head_groups import head_groups
from pronghorn.memory.mixture import MixtureStep
from pronghorn.memory.parallel import ParallelStep
from pronghorn.memory.parts import LatentShape
from pronghorn.memory.products import Held
from pronghorn.memory.recurrent import RecurrentMixtureStep, RecurrentStep
from pronghorn.memory.schedule import Step
from pronghorn.memory.shape import ModelShape

_CODES = ("q", "kv")
_RAISED = ("k", "v", "xa_q_up", "xa_kv_up")


class LatentStep(Step):
    """A step of a model whose heads are made of codes."""

    @property
    def _latent(self) -> LatentShape:
        assert self.shape.latent is not None
        return self.shape.latent

    def _trim_attention(self, level: Level, saves: Held) -> None:
        if not keeps(level, "all"):
            self._drop(saves, *_RAISED, *(["heads_q"] if self._latent.q_code else []))
        if not keeps(level, "attention"):
            self._drop(saves, "heads_q", *_CODES, "out", "lse", "xa_codes", "xa_o")

    def _attention(self, saves: Held) -> None:
        """`LatentAttentionBlock.rebuild`."""
        shape, t, e = self.shape, self.tokens, self.element
        if "out" in saves:
            return
        if "kv" not in saves:
            made = self._operand("q", t)
            self._keep(saves, "normed_attention", t * shape.hidden * e)
            self._free(self._new(4 * t))
            self._project(saves, _CODES, "xa_codes", t, made)
            if not self._latent.q_code:
                saves["heads_q"] = saves.pop("q")
        self._raise_codes(saves)
        wide = self._padded(1)
        out = self._padded(1)
        self._keep(saves, "lse", 4 * t * shape.heads)
        self._free(*wide)
        self._keep(saves, "out", t * shape.linear("o")[1] * e)
        self._free(*out)

    def _raise_codes(self, saves: Held) -> None:
        """`LatentAttentionBlock._raise_codes`: q, k and v of the codes."""
        shape, t, e = self.shape, self.tokens, self.element
        if "k" in saves:
            return
        if self._latent.q_code:
            self._raise(saves, "q_up", self._latent.q_code)
            saves["heads_q"] = saves.pop("q_up")
        self._raise(saves, "kv_up", self._latent.kv_code)
        self._keep(saves, "k", t * shape.q * e)
        self._keep(saves, "v", t * shape.linear("o")[1] * e)
        self._drop(saves, "kv_up")

    def _raise(self, saves: Held, name: str, code: int) -> None:
        """`Raised.forward`."""
        t = self.tokens
        made = self._operand(name, t)
        normed = self._new(t * code * self.element)
        self._free(self._new(4 * t))
        self._project(saves, (name,), f"xa_{name}", t, made)
        self._free(normed)

    def _padded(self, count: int) -> list[int]:
        """Values, or outputs, with as many columns as keys, where they have fewer."""
        wide = self._latent.value < self.shape.head_dim
        return [self._new(self.tokens * self.shape.q * self.element) for _ in range(count * wide)]

    def _attention_backward(self, saves: Held, dout_o: int, need: bool) -> int:
        """`LatentAttentionBlock.backward` from the gradient of the attention's output on."""
        shape, t, e = self.shape, self.tokens, self.element
        self._raise_codes(saves)
        groups = head_groups(t, shape.kv_heads, shape.attention)
        of_v = self._latent.value if groups > 1 else shape.head_dim
        gradients = [self._new(t * width * e) for width in (shape.q, shape.q, shape.heads * of_v)]
        for _ in range(groups):
            self._free(*[self._new(size) for size in self._backward_workspace(groups)][::-1])
        self._free(dout_o)
        self._drop(saves, "out", "lse", "k", "v", "heads_q")
        dq, dk, dv = gradients
        dpair = self._new(t * shape.linear("kv_up")[0] * e)
        dshared = self._new(t * self._latent.rope * e)
        dcode = self._lower(saves, "kv_up", self._latent.kv_code)
        self._free(dpair)
        dkv = self._new(t * shape.linear("kv")[0] * e)
        self._free(dcode, dshared)
        dfirst = dq
        if self._latent.q_code:
            dfirst = self._lower(saves, "q_up", self._latent.q_code)
        # `backward` holds what attention's backward gave until the codes' gradients are there.
        self._free(dk, dv, *([dq] if dfirst != dq else []))
        return self._through_norm(saves, _CODES, "xa_codes", [dfirst, dkv], need)

    def _backward_workspace(self, groups: int) -> list[int]:
        """What lives while the gradients of a group of heads are made: dout, v and out padded, and what others have."""
        sizes = self._attention_workspace()
        if self._latent.value == self.shape.head_dim:
            return sizes
        # Of a group dout and out are copied anyway.
        padded = [self.tokens * self.shape.q * self.element // groups] * 3
        return padded + (sizes[2:] if groups > 1 else sizes)

    def _lower(self, saves: Held, name: str, code: int) -> int:
        """`Raised.backward`: the gradient of the code."""
        size = self.tokens * code * self.element
        normed = self._new(size)
        self._free(self._new(4 * self.tokens))
        dnormed = self._input_grad((name,), self.tokens, f"xa_{name}" in saves)
        dcode = self._new(size)
        self._free(normed, dnormed)
        return dcode


class LatentMixtureStep(LatentStep, MixtureStep):
    """A step of a model with latent attention and mixtures of experts."""


def step_of(shape: ModelShape) -> type[Step]:
    """The kind of step that a model of `shape` takes."""
    if shape.parallel:
        return ParallelStep
    if shape.delta is not None:
        return RecurrentStep if shape.mixture is None else RecurrentMixtureStep
    if shape.latent is None:
        return Step if shape.mixture is None else MixtureStep
    return LatentStep if shape.mixture is None else LatentMixtureStep
