"""cos and sin of a stream's positions, for every kind of layer that a family has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pronghorn.engine.binding import Binding
from pronghorn.families.spec import ONE_ROTATION

#: `DecoderFamily.rotation` -> cos and sin, each [T, Drot]
Angles = dict[str | None, tuple[Tensor, Tensor]]


def angles_of(binding: Binding, decoder: Any, hidden: Tensor, positions: Tensor) -> Angles:
    """The angles of the positions [T] in the dtype of hidden [T, H], as the decoder's own rotary module gives them."""
    found: Angles = {}
    for kind in binding.rotations:
        if kind is None:
            continue
        which = () if kind == ONE_ROTATION else (kind,)
        cos, sin = decoder.rotary_emb(hidden[None], positions[None], *which)
        found[kind] = cos[0], sin[0]
    if None in binding.rotations:
        # A layer that does not rotate turns by no angle: x · 1 + x' · 0 is x.
        like = next(iter(found.values()))[0]
        found[None] = torch.ones_like(like), torch.zeros_like(like)
    return found
