"""Seconds of a training step: `memory.cost`'s roofline, and what it leaves out because every save plan has it alike."""

from __future__ import annotations

from collections.abc import Sequence

from pronghorn.blocks import Level, keeps
from pronghorn.blocks.glu import TILE_ROWS, tile_slices
from pronghorn.blocks.levels import Depth, space_of
from pronghorn.memory import Batch, ModelShape, Rates
from pronghorn.memory.cost import step_time

#: Kernels of a layer's forward and backward in a captured step (8B, `all`: 1,579, some 60 of them outside of layers),
#: and the gap between two of them (docs/lab-notes.md).
LAUNCHES, GAP = 50, 3e-6
#: Those that rebuilding adds, of the attention and of gate and up: 1.5B took 1,655 launches at `all`, 2,385 at
#: `offload`.
REBUILDING: dict[Depth, int] = {"attention": 18, "matmuls": 8}
#: Host work beside the micro-batches of an optimizer step: data, clipping, schedule, logs.
HOST_SECONDS = 1e-3
#: Bytes that clipping and a fused AdamW move for a trained element: gradient twice, parameter and two states both ways,
#: the copy in 16 bits.
OPTIMIZER_BYTES = 34


def micro_batch_seconds(
    shape: ModelShape,
    levels: Sequence[Level],
    batch: Batch,
    rates: Rates,
    tile_rows: int | None = None,
) -> float:
    """One micro-batch forward and backward, in a captured step."""
    tiles = len(tile_slices(batch.tokens, tile_rows or TILE_ROWS))
    space = space_of(levels, tile_rows)
    computed = step_time(shape, levels, batch, rates, tiles=tiles, space=space, tile_rows=tile_rows).total
    return computed + quantising_seconds(shape, batch, rates) + launches(shape, levels) * GAP


def launches(shape: ModelShape, levels: Sequence[Level]) -> int:
    """Kernels of a step."""
    rebuilt = sum(count for level in levels for depth, count in REBUILDING.items() if not keeps(level, depth))
    # 4-bit weights are unpacked forward, for the input gradients, and again where anything is rebuilt.
    again = len([level for level in levels if not keeps(level, "matmuls")])
    unpacking = (2 * len(levels) + again) * len(shape.modules) if shape.unpacked_forward else 0
    return LAUNCHES * len(levels) + rebuilt + unpacking


def quantising_seconds(shape: ModelShape, batch: Batch, rates: Rates) -> float:
    """Reading X and dY of all products and writing their codes, where products multiply 8-bit codes."""
    if not shape.eight_bit_forward:
        return 0.0
    # Forward: one input for q, k, v, one for o, one for gate and up, one for down. Backward: every dY.
    inputs = sum(shape.linear(name)[1] for name in ("q", "o", "gate", "down"))
    outputs = sum(shape.linear(name)[0] for name in shape.projections)
    return shape.layers * batch.tokens * (inputs + outputs) * (shape.element + 1) / rates.bandwidth


def optimizer_seconds(shape: ModelShape, rates: Rates) -> float:
    """Clipping, AdamW and the host's work between two optimizer steps."""
    trained = shape.adapter_parameters if shape.trained == "adapters" else shape.parameters
    return HOST_SECONDS + trained * OPTIMIZER_BYTES / rates.bandwidth
