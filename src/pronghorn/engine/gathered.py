"""When a model's frozen weights move into common buffers (`weights.gathered`): where memory is short and it saves some.

What the allocator rounds is lost for a run's whole length: weights below 1 MiB lie in segments of 2 MiB, those up to
10 MiB in segments of 20 MiB, and where weights are laid side by side (`engine.joined`), the places they leave fit few
others. In buffers all of it comes to less than 2 MiB each, and groups lie side by side from the start.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pronghorn.blocks import LinearProjection
from pronghorn.engine.binding import Binding
from pronghorn.engine.joined import joins, weights_to_join
from pronghorn.engine.planning import device_limits, shape_of
from pronghorn.memory import Batch, available_host_bytes, estimate, with_margin
from pronghorn.memory.allocator import MIB, Allocator, whole_segment
from pronghorn.weights import (
    Block,
    DenseWeight,
    blocks_of,
    buffers_of,
    gather,
    side_by_side,
    size_of,
    tensors_of,
)

logger = logging.getLogger("pronghorn")

#: Of a budget, what must be saved for weights to move.
WORTH_IT = 1 / 400
#: Of the host's memory that is available, what weights on their way may take.
_HOST_SHARE = 0.5


@dataclass(frozen=True)
class Gathering:
    """What `weights.gather` moves of a model, and what that saves.

    Args:
        blocks: frozen weights. aside: the other parameters that own their memory, adapters among them.
        together: bytes of the largest group that would exist twice were it laid side by side without this; 0 where all
            lie so.
    """

    blocks: Sequence[Block]
    aside: Sequence[Block]
    together: int

    @property
    def host(self) -> int:
        """Bytes of host memory that moving takes."""
        return sum(block.nbytes for block in (*self.blocks, *self.aside))

    def moved(self) -> dict[int, int]:
        """Bytes by address of what leaves its place."""
        tensors = (tensor for block in (*self.blocks, *self.aside) for tensor in block.tensors)
        storages = (tensor.untyped_storage() for tensor in tensors)
        return {storage.data_ptr(): storage.nbytes() for storage in storages}

    def saves(self, segments: Iterable[Mapping[str, Any]]) -> int:
        """Bytes by which the allocator then holds less, of its segments as they are (`torch.cuda.memory_snapshot`)."""
        return released(segments, self.moved()) + whole_segment(self.together) - self.takes()

    def takes(self) -> int:
        """Bytes that the allocator holds for all of it in its new places."""
        memory = Allocator()
        for buffer in buffers_of(self.blocks):
            memory.new(size_of(buffer))
        for block in self.aside:
            memory.new(block.nbytes)
        return memory.reserved


def gathering_of(binding: Binding) -> Gathering:
    """What can move of a bound model: all that nobody else reads."""
    device = next(binding.model.parameters()).device
    here = [tensor for tensor in tensors_of(binding.model) if tensor.device == device]
    frozen = [tensor for tensor in here if not tensor.requires_grad]
    blocks = blocks_of(frozen, _together(binding))
    groups = (block for block in blocks if len(block.tensors) > 1)
    apart = (group.nbytes for group in groups if side_by_side([t.data for t in group.tensors], 0) is None)
    together = max(apart, default=0)
    return Gathering(blocks, blocks_of(tensor for tensor in here if tensor.requires_grad), together)


def _together(binding: Binding) -> list[list[Tensor]]:
    """Weights, and biases, that products take as one."""
    found: list[list[Tensor]] = []
    for (_, slot), projections in binding.all_groups().items():
        weights = [
            weight.weight for weight in weights_to_join(slot, projections) if isinstance(weight, DenseWeight)
        ]
        biases = [p.bias for p in projections if isinstance(p, LinearProjection) and p.bias is not None]
        if weights:
            found.append(weights)
            found += [biases] if len(biases) == len(weights) else []
    return found


def staying(segments: Iterable[Mapping[str, Any]], moved: Mapping[int, int]) -> list[int]:
    """Bytes of what stays in segments that something leaves, the largest first: what keeps these from going back."""
    found: list[int] = []
    for segment in segments:
        address, moves, stays = segment["address"], 0, []
        for block in segment["blocks"]:
            if address in moved:
                moves += 1
            elif block["state"] != "inactive":
                stays.append(block["size"])
            address += block["size"]
        found += stays if moves else []
    return sorted(found, reverse=True)


def released(segments: Iterable[Mapping[str, Any]], moved: Mapping[int, int]) -> int:
    """Bytes of the allocator's segments that hold something, and nothing but what moves.

    Args:
        segments: of `torch.cuda.memory_snapshot`. moved: bytes by address.
    """
    found = 0
    for segment in segments:
        address, moves = segment["address"], []
        for block in segment["blocks"]:
            if block["state"] != "inactive":
                asked = block.get("requested_size", block["size"])
                moves.append(moved.get(address, -1) >= asked)
            address += block["size"]
        found += segment["total_size"] if moves and all(moves) else 0
    return found


def gather_for(binding: Binding, budget: str | int, batch: Batch) -> int:
    """Move a model's frozen weights into common buffers where a budget does not let all layers keep everything, and the
    allocator then holds noticeably less; before steps are laid out. Returns the bytes saved, 0 where nothing moved.

    Args:
        budget, batch: as `planning.plan_levels` takes them.

    Raises:
        BudgetInvalid: a budget that is no size.
    """
    device = next(binding.model.parameters()).device
    limits = device_limits(binding, budget)
    if not joins(device) or binding.elsewhere or binding.laid_out:
        return 0
    shape = shape_of(binding)
    if shape.trained == "all":
        return 0
    everything = estimate(shape, "all", batch, capability=limits.rates.capability).reserved
    gathering = gathering_of(binding)
    segments = _segments(device)
    saved = gathering.saves(segments)
    if with_margin(everything + max(saved, 0), shape) <= limits.budget:
        return 0
    if saved < WORTH_IT * limits.budget:
        frozen = sum(not parameter.requires_grad for parameter in binding.model.parameters())
        between = [f"{size / MIB:.1f}" for size in staying(segments, gathering.moved())[:3]]
        logger.info(
            "pronghorn: weights stay where they are: in common buffers %d of %d frozen ones would save %.0f MiB; the "
            "largest of what lies between them and does not move, in MiB: %s",
            sum(len(block.tensors) for block in gathering.blocks), frozen, saved / MIB, ", ".join(between) or "nothing",
        )  # fmt: skip
        return 0
    there = available_host_bytes()
    if gathering.host > _HOST_SHARE * there:
        sizes = gathering.host / 2**30, there / 2**30
        logger.info(
            "pronghorn: weights stay apart: %.1f GiB would go through the host's %.1f free ones", *sizes
        )
        return 0
    gather(gathering.blocks, gathering.aside)
    logger.warning(
        "pronghorn: frozen weights lie in common buffers now, %.2f GiB less of what the allocator rounds",
        saved / 2**30,
    )
    return saved


def _segments(device: torch.device) -> list[Mapping[str, Any]]:
    """What the allocator holds on a device, but for what nobody uses."""
    release = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if release is not None:
        # One of them may lie between weights and keep their segment; the next product makes another.
        release()
    torch.cuda.empty_cache()
    index = torch.cuda.current_device() if device.index is None else device.index
    return [segment for segment in torch.cuda.memory_snapshot() if segment["device"] == index]
