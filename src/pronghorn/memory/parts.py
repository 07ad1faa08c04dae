"""Sizes of what only some models have: mixtures of experts, latent attention, linear attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class MixtureShape:
    """The MLP of a layer that is a mixture of experts.

    Args:
        experts, top_k: how many there are, and how many a token goes to.
        intermediate: of one expert. `shared`: of the one that every token goes through besides, 0 without.
        ranks: adapter rank of the stacks "gate_up" and "down".
        wide_logits: the router's logits are fp32.
    """

    experts: int
    top_k: int
    intermediate: int
    shared: int = 0
    ranks: Mapping[str, int] = field(default_factory=lambda: {"gate_up": 0, "down": 0})
    wide_logits: bool = False

    def sizes(self, hidden: int) -> dict[str, tuple[int, int]]:
        """(out, in) of an expert's matrices."""
        return {"gate_up": (2 * self.intermediate, hidden), "down": (hidden, self.intermediate)}


@dataclass(frozen=True)
class LatentShape:
    """Latent attention, whose q, k and v are made of codes (`blocks.latent_attention`).

    Args:
        q_code, kv_code: columns of the codes, without the rotated key. q_code is 0 where the layer's input gives q.
        nope, rope, value: columns of a head: of q and k without and with rotation, of v.
    """

    q_code: int
    kv_code: int
    nope: int
    rope: int
    value: int

    @property
    def raised(self) -> tuple[str, ...]:
        """The projections that read codes."""
        return ("q_up", "kv_up") if self.q_code else ("kv_up",)


@dataclass(frozen=True)
class DeltaShape:
    """Layers of linear attention by the gated delta rule (`blocks.delta_net`), among those of `ModelShape`'s attention.

    Args:
        kinds: of each layer, whether it is one.
        inputs: by name what the projections of a layer's input give. `output`: the one that reads the rule's output.
        keys, key_dim: heads of q and k, and their size. values, value_dim: of v.
        conv: width of the convolution.
    """

    kinds: tuple[bool, ...]
    inputs: Mapping[str, int]
    keys: int
    key_dim: int
    values: int
    value_dim: int
    conv: int
    output: str = "o_recurrent"

    @property
    def mixed(self) -> int:
        """Columns of q, k and v side by side."""
        return 2 * self.keys * self.key_dim + self.wide

    @property
    def wide(self) -> int:
        """Columns of v, and of what the rule gives."""
        return self.values * self.value_dim

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.inputs, self.output)
