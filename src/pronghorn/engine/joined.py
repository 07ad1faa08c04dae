"""Frozen weights of q, k, v and of gate, up laid side by side, so that one product takes a group (`weights.stack`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pronghorn.blocks import LinearProjection, joining
from pronghorn.blocks.projection import Projection
from pronghorn.engine.binding import Binding
from pronghorn.hardware import gpu_memory
from pronghorn.weights import DenseWeight, Weight, join, join_tensors, side_by_side, stacked

#: Share of the free device memory by which the allocator's reserve may grow from weights that have moved, where memory
#: is not short: the places they leave are reused for other tensors, but not always for the next weights.
_GROWTH = 1 / 16


def joins(device: torch.device) -> bool:
    """Whether a training step on a device lays weights side by side. On a CPU it gains nothing."""
    return device.type == "cuda"


def weights_to_join(slot: int, projections: Sequence[Projection]) -> list[Weight]:
    """The plain weights of a group that products take as one, by its slot (`read_groups`); else none."""
    wanted = joining.QKV_INPUT_GRAD if slot == 0 else slot == 4 and joining.GATE_UP_FORWARD
    wanted = wanted and len(projections) > 1
    linear = [p.weight for p in projections if isinstance(p, LinearProjection)]
    plain = all(type(weight) is DenseWeight and weight.parameter is None for weight in linear)
    return list(linear) if wanted and plain and len(linear) == len(projections) else []


def join_weights(
    groups: Mapping[tuple[int, int], Sequence[Projection]], *, roomy: bool, spare: int | None = None
) -> int:
    """Join groups of projections, by (layer, slot); returns how many lie side by side now.

    One group at a time exists twice. The rest stays as it is once the moving has taken more memory than one group, or
    where memory is `roomy` a share of what is free; of planned memory no more than its `spare` bytes are taken.
    """
    done, largest, before = 0, 0, None
    for (_, slot), projections in groups.items():
        weights = weights_to_join(slot, projections)
        if not weights or stacked(weights) is not None:
            done += bool(weights)
            continue
        first = weights[0]
        assert isinstance(first, DenseWeight)
        device, element = first.weight.device, first.weight.element_size()
        if not joins(device):
            continue
        size = element * sum(weight.shape[0] * weight.shape[1] for weight in weights)
        largest = max(largest, size)
        free, reserved = _memory(device)
        before = reserved if before is None else before
        grown = reserved - before
        if spare is None:
            enough = grown <= max(1.25 * largest, free * _GROWTH * roomy)
        else:
            enough = grown + size <= spare
        if not enough or free < 2 * size:
            break
        done += join(weights)
        biases = [p.bias for p in projections if isinstance(p, LinearProjection) and p.bias is not None]
        if len(biases) == len(projections) and side_by_side(biases, 0) is None:
            join_tensors(biases)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return done


def join_all(binding: Binding) -> int:
    """`join_weights` of a model before it is trained, of all groups while there is memory."""
    return join_weights(binding.all_groups(), roomy=True)


def _memory(device: torch.device) -> tuple[float, float]:
    """Bytes that are free, and that the allocator holds; without limit where nobody counts them."""
    if device.type != "cuda":
        return float("inf"), 0.0
    memory = gpu_memory(device)
    return memory.within_reach - memory.reserved, memory.reserved
