"""Write a safetensors file one tensor at a time, so that memory holds one tensor and not a whole shard.

The format: 8 bytes little-endian header length; a JSON header {name: {dtype, shape, data_offsets}}, padded with
spaces to a multiple of 8; then the tensors' bytes, contiguous, without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
}


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written: what it will be, and how to make it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, entries: Sequence[Entry]) -> None:
    """Write the entries in order of falling alignment, as the format asks for.

    Raises:
        ValueError: when a tensor turns out to have another shape or dtype than its entry says.
    """
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for entry in ordered:
            _write_tensor(file, entry)


def _write_tensor(file: BinaryIO, entry: Entry) -> None:
    tensor = entry.make()
    if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
        raise ValueError(
            f"{entry.name} is {tensor.dtype} {list(tensor.shape)}, not {entry.dtype} {list(entry.shape)}"
        )
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    file.write(memoryview(flat.numpy()))  # no copy


def plan_shards(entries: Sequence[Entry], most_bytes: int) -> list[list[Entry]]:
    """Consecutive entries in shards of at most `most_bytes`; a larger tensor has a shard of its own."""
    shards: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not shards or entry.nbytes > room:
            shards.append([])
            room = most_bytes
        shards[-1].append(entry)
        room -= entry.nbytes
    return shards
