"""Frozen tensors moved into a few common buffers, in which the allocator's rounding of each is gone.

Tensors stay the objects they are, `nn.Parameter`s among them; what they read from moves. Each block of tensors that
belong together has a storage of its own over its part of the buffer, so that whoever saves, copies or compares storages
meets no others in it. A buffer lives as long as one of its blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.weights.adjacent import held_by
from pronghorn.weights.experts import four_bit_states
from pronghorn.weights.stack import stays_in_place

#: Bytes of a buffer at most, unless one block is larger. Fewer buffers leave less rounding (2 MiB each at most).
BUFFER = 1 << 30
#: Blocks begin at multiples of this: kernels' copy engines want 16 bytes, matrix products up to 256.
ALIGNMENT = 256


@dataclass(frozen=True)
class Block:
    """Tensors that lie one behind the other in one storage, and are all that does."""

    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def aligned(self) -> int:
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT


def blocks_of(tensors: Iterable[Tensor], together: Iterable[Sequence[Tensor]] = ()) -> list[Block]:
    """The tensors that can be moved, by what lies in one storage.

    Left out is whatever somebody else reads, too: a storage with views of it that are not among `tensors` (a user's
    own), or that overlap (tied weights of two parameters), a tensor that is kept in place, and one with a gradient.

    Args:
        together: groups that are to lie side by side in their order, of those that have storages of their own now.
    """
    by_storage: dict[int, list[Tensor]] = {}
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        by_storage.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    units = [sorted(unit, key=lambda tensor: tensor.storage_offset()) for unit in by_storage.values()]
    units = [unit for unit in units if _stands_alone(unit)]
    single = {id(unit[0]): unit for unit in units if len(unit) == 1}
    joined: set[int] = set()
    blocks = []
    for group in together:
        if len(group) > 1 and all(id(t) in single and id(t) not in joined for t in group) and _alike(group):
            joined |= {id(tensor) for tensor in group}
            blocks.append(Block(tuple(group)))
    return blocks + [Block(tuple(unit)) for unit in units if id(unit[0]) not in joined]


def _alike(group: Sequence[Tensor]) -> bool:
    return len({(tensor.dtype, tensor.device) for tensor in group}) == 1


def _stands_alone(unit: Sequence[Tensor]) -> bool:
    """Whether tensors of one storage, in its order, are all of it, and nobody else has it."""
    storage, end = unit[0].untyped_storage(), 0
    if not _alike(unit):
        return False
    for tensor in unit:
        if not _is_plain(tensor) or tensor.storage_offset() * tensor.element_size() != end:
            return False
        end += tensor.nbytes
    return 0 < end == storage.nbytes() and held_by(storage, len(unit))


def _is_plain(tensor: Tensor) -> bool:
    strided = tensor.layout == torch.strided and tensor.is_contiguous() and not tensor.is_inference()
    return strided and tensor.grad is None and type(tensor.data) is Tensor and not stays_in_place(tensor)


def buffers_of(blocks: Sequence[Block]) -> list[list[Block]]:
    """Which blocks share a buffer: the largest first, each in the first buffer that has room."""
    buffers: list[list[Block]] = []
    filled: list[int] = []
    for block in sorted(blocks, key=lambda block: block.nbytes, reverse=True):
        at = next((i for i, size in enumerate(filled) if size + block.aligned <= BUFFER), len(filled))
        if at == len(filled):
            buffers.append([])
            filled.append(0)
        buffers[at].append(block)
        filled[at] += block.aligned
    return buffers


def size_of(buffer: Sequence[Block]) -> int:
    """Bytes of a buffer of blocks."""
    return sum(block.aligned for block in buffer)


def gather(blocks: Sequence[Block], aside: Sequence[Block] = ()) -> None:
    """Move blocks into common buffers on their device, through the host's memory.

    All of them are on the host at once, so that the device never holds one twice: allocators give memory back by whole
    segments, and Transformers asks for one that holds a model.

    Args:
        blocks: of `blocks_of`, on one device.
        aside: blocks that would keep segments from being given back; they return to memory of their own.

    Raises:
        torch.OutOfMemoryError: others have taken the device's memory meanwhile; the tensors are on the host then.
    """
    if not blocks:
        return
    device = blocks[0].tensors[0].device
    with torch.no_grad():
        _to_host([*blocks, *aside])
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for buffer in buffers_of(blocks):
            for block, memory in zip(buffer, _memory_of(buffer, device), strict=True):
                _place(block, memory)
        for block in aside:
            _place(block, _bytes(block.nbytes, device))


def _to_host(blocks: Sequence[Block]) -> None:
    tensors = [tensor for block in blocks for tensor in block.tensors]
    # Nothing has moved if the host's memory does not do.
    copies = [tensor.data.to("cpu", copy=True) for tensor in tensors]
    for tensor, copy in zip(tensors, copies, strict=True):
        tensor.data = copy


def _memory_of(buffer: Sequence[Block], device: torch.device) -> list[Tensor]:
    """Memory for each block of a buffer: parts of it, or where there is none in one piece any more, pieces."""
    try:
        whole = _bytes(size_of(buffer), device)
    except torch.OutOfMemoryError:
        return [_bytes(block.nbytes, device) for block in buffer]
    parts = whole.split([block.aligned for block in buffer])
    # By way of DLPack each part has a storage that begins and ends with it, and keeps the whole alive.
    return [torch.from_dlpack(part[: block.nbytes]) for part, block in zip(parts, buffer, strict=True)]


def _bytes(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _place(block: Block, memory: Tensor) -> None:
    """Copy a block's tensors into memory (uint8) and let them read from there."""
    start = 0
    for tensor in block.tensors:
        part = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        part.copy_(tensor.data)
        start += tensor.nbytes
        tensor.data = part


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """The tensors that a model holds: parameters, buffers, and of 4-bit weights what is needed to read them."""
    for parameter in model.parameters():
        yield parameter
        yield from _tensors_in(getattr(parameter, "quant_state", None))
    yield from model.buffers()
    for module in model.modules():
        for state in four_bit_states(module).values():
            yield from _tensors_in(state)


def _tensors_in(state: Any) -> Iterator[Tensor]:
    """Of bitsandbytes' `QuantState`."""
    while state is not None:
        yield from (value for value in vars(state).values() if isinstance(value, Tensor))
        state = getattr(state, "state2", None)
