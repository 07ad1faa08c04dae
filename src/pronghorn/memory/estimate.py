"""What a training step takes on a GPU, predicted to the byte from sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pronghorn.blocks import check_levels, host_bytes_per_token
from pronghorn.blocks.glu import TILE_ROWS
from pronghorn.memory.allocator import MIB, Allocator, GrowingAllocator
from pronghorn.memory.latent import step_of
from pronghorn.memory.schedule import Batch
from pronghorn.memory.shape import ModelShape

#: Workspaces of the matrix library, one for the thread that runs forward and one for autograd's, by GPU generation.
LIBRARY_BYTES = {9: 2 * 32 * MIB}
OTHER_LIBRARY_BYTES = 2 * 8320 * 1024
#: in how many parts what a piece is short of is tried to be added to it
SETTLING = 8


@dataclass(frozen=True)
class Estimate:
    """Bytes of one training step.

    `fixed`: weights, adapters, gradients, optimizer states, libraries. `moments`: the most that is allocated in
    forward, loss and backward, `fixed` included. `host`: pinned host memory. `piece`: what to ask for at once, so that
    the large tensors of a recorded step lie in one segment.
    """

    fixed: int
    weights: int
    allocated: int
    reserved: int
    host: int
    moments: dict[str, int]
    piece: int = 0


@dataclass(frozen=True)
class Inner:
    """A second decoder, whose forward and backward stand between the first one's."""

    shape: ModelShape
    levels: str | Sequence[str]
    batch: Batch


def estimate(
    shape: ModelShape,
    levels: str | Sequence[str],
    batch: Batch,
    *,
    tile_rows: int | None = None,
    capability: tuple[int, int] = (9, 0),
    inner: Inner | None = None,
    more: Sequence[int] = (),
    settled_up_to: float = 0.0,
) -> Estimate:
    """Predict a step at the given save levels; see `Estimate`.

    Args:
        inner: a second decoder of the model.
        more: bytes of further tensors that live from step to step.
        settled_up_to: where no more bytes than these are predicted, look what a recorded step takes within the piece
            that it asks for, which is one to seven times the work; else some is missing where a tensor finds no hole
            there.
    """
    parts = [Inner(shape, levels, batch), *([inner] if inner else [])]
    memory, fixed, weights = with_model(shape, capability, [part.shape for part in parts[1:]], more)
    checked = [check_levels(part.levels, part.shape.layers) for part in parts]

    def step(on: Allocator) -> dict[str, int]:
        steps = [
            step_of(part.shape)(part.shape, found, part.batch, on, tile_rows or TILE_ROWS)
            for part, found in zip(parts, checked, strict=True)
        ]
        steps[0].run(*(one.run for one in steps[1:]))
        return {name: max(one.moments[name] for one in steps) for name in steps[0].moments}

    piece = 0
    if shape.captured:
        # A graph is recorded once, into segments that nothing else uses.
        pool = GrowingAllocator() if shape.in_one_piece else Allocator()
        moments = {name: fixed + size for name, size in step(pool).items()}
        held, piece = pool.peak_reserved, 0
        if isinstance(pool, GrowingAllocator):
            piece = pool.piece
            if memory.reserved + held <= settled_up_to:
                held, piece = _settled(step, held, piece)
        reserved, left = memory.reserved + held, pool.allocated
    else:
        moments = step(memory)
        # The second step meets the blocks that the first one left, in another order than they were made in.
        step(memory)
        reserved, left = memory.peak_reserved, memory.allocated - fixed
    assert left == 0, "the schedule leaves something allocated"
    host = sum(
        sum(host_bytes_per_token(level, part.shape.widths) for level in found) * part.batch.tokens
        for part, found in zip(parts, checked, strict=True)
    )
    return Estimate(fixed, weights, max(moments.values()), reserved, host, moments, piece)


def _settled(step: Callable[[Allocator], object], held: int, piece: int) -> tuple[int, int]:
    """What a step reserves within a piece that is there from the beginning, and the piece for which that is least.

    A segment that grows is never too short for what is asked next, but a piece ends: what takes its rest instead of a
    larger hole leaves other holes behind, and a large tensor that fits none gets a segment of its own (8B, a row of
    221,184 tokens in 24 GiB on an H200: 22.5 GiB, not the 20.8 expected). Half a gigabyte more lets it find one.
    """

    def within(size: int) -> int:
        pool = Allocator()
        pool.free(pool.new(size))
        step(pool)
        return pool.peak_reserved

    besides = held - piece
    best = within(piece), piece
    short = best[0] - besides - piece
    for part in range(1, SETTLING) if short > piece >> 8 else ():
        size = piece + (short * part // SETTLING // (2 * MIB) + 1) * 2 * MIB
        if size + besides >= best[0]:
            break
        best = min(best, (within(size), size))
    return best


def with_model(
    shape: ModelShape,
    capability: tuple[int, int],
    others: Sequence[ModelShape] = (),
    more: Sequence[int] = (),
) -> tuple[Allocator, int, int]:
    """An allocator that holds what lives from step to step; the bytes of all of it and of the weights.

    Args:
        others, more: decoders and bytes of tensors that the model has besides.
    """
    memory = Allocator()
    for size in (*more, *(size for one in (shape, *others) for size in one.weight_tensors())):
        memory.new(size)
    weights = memory.allocated
    for size in (size for one in (shape, *others) for size in one.laid_out_tensors()):
        memory.new(size)
    if shape.placed is not None:
        memory.reserve(shape.placed)
    for size in (size for one in (shape, *others) for size in one.optimizer_tensors()):
        memory.new(size)
    library = LIBRARY_BYTES.get(capability[0], OTHER_LIBRARY_BYTES)
    for _ in range(2):
        memory.new(library // 2)
    return memory, memory.allocated, weights
