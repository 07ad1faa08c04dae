"""What a training step takes on a GPU, predicted to the byte from sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pronghorn.blocks import check_levels, host_bytes_per_token
from pronghorn.blocks.glu import TILE_ROWS
from pronghorn.memory.allocator import MIB, Allocator
from pronghorn.memory.latent import step_of
from pronghorn.memory.schedule import Batch
from pronghorn.memory.shape import ModelShape

#: Workspaces of the matrix library, one for the thread that runs forward and one for autograd's, by GPU generation.
LIBRARY_BYTES = {9: 2 * 32 * MIB}
OTHER_LIBRARY_BYTES = 2 * 8320 * 1024


@dataclass(frozen=True)
class Estimate:
    """Bytes of one training step.

    `fixed`: weights, adapters, gradients, optimizer states, libraries. `moments`: the most that is allocated in
    forward, loss and backward, `fixed` included. `host`: pinned host memory.
    """

    fixed: int
    weights: int
    allocated: int
    reserved: int
    host: int
    moments: dict[str, int]


def estimate(
    shape: ModelShape,
    levels: str | Sequence[str],
    batch: Batch,
    *,
    tile_rows: int | None = None,
    capability: tuple[int, int] = (9, 0),
) -> Estimate:
    """Predict a step at the given save levels; see `Estimate`."""
    checked = check_levels(levels, shape.layers)
    memory, fixed, weights = with_model(shape, capability)
    kind = step_of(shape)
    step = kind(shape, checked, batch, memory, tile_rows or TILE_ROWS)
    step.run()
    # The second step meets the blocks that the first one left, in another order than they were made in.
    kind(shape, checked, batch, memory, tile_rows or TILE_ROWS).run()
    assert memory.allocated == fixed, "the schedule leaves something allocated"
    host = sum(host_bytes_per_token(level, shape.widths) for level in checked) * batch.tokens
    return Estimate(fixed, weights, max(step.moments.values()), memory.peak_reserved, host, step.moments)


def with_model(shape: ModelShape, capability: tuple[int, int]) -> tuple[Allocator, int, int]:
    """An allocator that holds what lives from step to step; the bytes of all of it and of the weights."""
    memory = Allocator()
    for size in shape.weight_tensors():
        memory.new(size)
    weights = memory.allocated
    for size in shape.training_tensors():
        memory.new(size)
    library = LIBRARY_BYTES.get(capability[0], OTHER_LIBRARY_BYTES)
    for _ in range(2):
        memory.new(library // 2)
    return memory, memory.allocated, weights
