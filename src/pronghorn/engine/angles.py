"""What follows from a stream's positions: cos and sin for every kind of layer, and factors of queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pronghorn.engine.binding import Binding
from pronghorn.engine.stream import Stream
from pronghorn.families.spec import ONE_ROTATION

#: `DecoderFamily.rotation` -> cos and sin, each [T, Drot], or [T, Drot / 2] where a module turns pairs
Angles = dict[str | None, tuple[Tensor, Tensor]]


def angles_of(binding: Binding, decoder: Any, hidden: Tensor, positions: Tensor) -> Angles:
    """The angles of the positions [T] in the dtype of hidden [T, H], as the decoder's own rotary module gives them.

    A module with `mrope_section` turns parts of each head by a token's time, height and width, which are positions
    [3, T]; those of text are alike.
    """
    found: Angles = {}
    if hasattr(decoder.rotary_emb, "mrope_section"):
        positions = positions.expand(3, -1)
    # Layers that do not rotate take the width of the others' angles.
    for kind in binding.rotations if any(k is not None for k in binding.rotations) else (ONE_ROTATION,):
        if kind == ONE_ROTATION and getattr(decoder.rotary_emb, "rope_type", None) == "longrope":
            found[kind] = _longrope(binding, decoder.rotary_emb, hidden, positions)
        elif kind is not None:
            which = () if kind == ONE_ROTATION else (kind,)
            given = decoder.rotary_emb(hidden[None], positions.unsqueeze(-2), *which)
            # DeepSeek-V2's module gives complex numbers in fp32, each angle once.
            complex_ones = isinstance(given, Tensor)
            cos, sin = (given.real.contiguous(), given.imag.contiguous()) if complex_ones else given
            if not complex_ones and cos.shape[-1] == _frequencies(decoder.rotary_emb):
                # gpt-oss gives each angle once, where others repeat them for the second half.
                cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
            if binding.family.turns != binding.family.angles:
                half = cos.shape[-1] // 2
                cos, sin = (angle[..., :half].repeat_interleave(2, -1) for angle in (cos, sin))
            found[kind] = cos[0], sin[0]
    if None in binding.rotations:
        # A layer that does not rotate turns by no angle: x · 1 + x' · 0 is x.
        like = next(iter(found.values()))[0]
        found[None] = torch.ones_like(like), torch.zeros_like(like)
    return found


def _frequencies(rotary: Any) -> int:
    """How many a rotary module has; 0 for one with several kinds of angles."""
    held = getattr(rotary, "inv_freq", None)
    return held.numel() if isinstance(held, Tensor) else 0


def _longrope(binding: Binding, rotary: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """LongRoPE (arXiv 2402.13753): one of two sets of frequencies, by the longest document of the stream.

    Transformers' module asks the device for that length in some versions, which waits for it and cannot be recorded.
    """
    config, device = rotary.config, hidden.device
    longest_short = config.rope_parameters["original_max_position_embeddings"]
    if device not in binding.frequencies:
        init = ROPE_INIT_FUNCTIONS["longrope"]
        short, long = (init(config, device, seq_len=n)[0] for n in (longest_short, longest_short + 1))
        binding.frequencies[device] = short, long
    short, long = binding.frequencies[device]
    angles = positions[:, None].float() * torch.where(positions.max() >= longest_short, long, short)
    angles = torch.cat([angles, angles], 1)
    scale = rotary.attention_scaling
    return (angles.cos() * scale).to(hidden.dtype), (angles.sin() * scale).to(hidden.dtype)


def query_scale_of(binding: Binding, stream: Stream, dtype: torch.dtype) -> Tensor | None:
    """Factors [T, 1, 1] of rotated queries (`Scales.query_growth`); None where all are 1."""
    growth = binding.scales.query_growth
    if growth is None or stream.docs.max_seqlen <= growth[1]:
        return None
    beta, length = growth
    factors = 1 + beta * torch.log(1 + torch.floor(stream.position_ids / length))
    return factors.to(dtype)[:, None, None]
