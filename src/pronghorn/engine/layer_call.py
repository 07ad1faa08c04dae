"""What the decoder's forward hands to its layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pronghorn.blocks.moe import RouterBalance
from pronghorn.blocks.projection import PackedAdapters, Projection
from pronghorn.engine.angles import Angles, angles_of, query_scale_of
from pronghorn.engine.binding import Binding
from pronghorn.engine.flat import FlatAdapters
from pronghorn.engine.stream import Stream
from pronghorn.memory import HostStash

#: a layer's projections by slot, with the group's packed adapters while a `TrainingStep` runs
ReadGroups = dict[int, tuple[list[Projection], PackedAdapters | None]]


def compute_dtype(binding: Binding, hidden_states: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's, else the one the weights ask for, else the residual stream's."""
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return binding.weight_dtype or hidden_states.dtype


@dataclass(frozen=True)
class LayerCall:
    """What the decoder's forward hands to every layer's; angles by `DecoderFamily.rotation`."""

    binding: Binding
    stream: Stream
    angles: Angles
    dtype: torch.dtype
    seed: int
    stash: HostStash | None = None
    packed: FlatAdapters | None = None
    query_scale: Tensor | None = None
    balance: RouterBalance | None = None

    @staticmethod
    def of(
        binding: Binding,
        hidden_states: Tensor,
        stream: Stream,
        seed: int,
        stash: HostStash | None = None,
        packed: FlatAdapters | None = None,
        balance: RouterBalance | None = None,
    ) -> LayerCall:
        """For embedded tokens [T, H] of a stream."""
        return LayerCall(
            binding,
            stream,
            angles_of(binding, binding.decoder, hidden_states, stream.position_ids),
            compute_dtype(binding, hidden_states),
            seed,
            stash,
            packed,
            query_scale_of(binding, stream, hidden_states.dtype),
            balance,
        )
