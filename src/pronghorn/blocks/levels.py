"""Save levels: what a decoder layer keeps between forward and backward.

Each level keeps what the one before keeps, and more. Whatever is not kept is rebuilt in backward from the layer's
input, which is always kept: on the device, or with "offload" in the host's memory.

| level     | kept besides the layer's input                                   | rebuilt in backward            |
|-----------|------------------------------------------------------------------|--------------------------------|
| offload   | nothing; the input is in pinned host memory                      | everything but the down matmul |
| none      | nothing                                                          | everything but the down matmul |
| attention | attention output and statistics                                  | q, k, v, o, gate, up           |
| matmuls   | + q, k, v, residual sum, gate, up, adapter products XA           | norms, RoPE on normed q/k, act |
| all       | + norm outputs                                                   | activation product             |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from pronghorn.errors import UnknownSaveLevel, nearest

Level = Literal["offload", "none", "attention", "matmuls", "all"]
LEVELS: tuple[Level, ...] = ("offload", "none", "attention", "matmuls", "all")


def check_level(name: str) -> Level:
    """`name` as a level. "unsloth", an older script's word for offloaded checkpointing, is "offload".

    Raises:
        UnknownSaveLevel: with the known names.
    """
    if name == "unsloth":
        return "offload"
    if name not in LEVELS:
        fix = f"use one of {', '.join(LEVELS)}; {nearest(name, LEVELS)}".rstrip("; ")
        raise UnknownSaveLevel(f"'{name}' is not a save level", fix=fix)
    return cast(Level, name)


def check_levels(levels: str | Sequence[str], layers: int) -> tuple[Level, ...]:
    """One level for every layer, from one name or a list of names."""
    if isinstance(levels, str):
        return (check_level(levels),) * layers
    if len(levels) != layers:
        raise UnknownSaveLevel(
            f"{len(levels)} save levels were given for {layers} layers",
            fix=f"give one name or a list of {layers}",
        )
    return tuple(check_level(name) for name in levels)


def keeps(level: Level, least: Level) -> bool:
    """Whether `level` keeps what `least` introduces."""
    return LEVELS.index(level) >= LEVELS.index(least)


@dataclass(frozen=True)
class LayerWidths:
    """The sizes that decide how many bytes a layer keeps: element counts per token, element size in bytes."""

    hidden: int
    q: int
    kv: int
    heads: int
    intermediate: int
    adapter_ranks: int
    element: int
    residual_element: int


def saved_bytes_per_token(level: Level, widths: LayerWidths) -> int:
    """Device bytes a token costs in one layer at a save level, layer input included. Exact; a test holds it to it."""
    w = widths
    total = w.hidden * w.residual_element if keeps(level, "none") else 0
    if keeps(level, "attention"):
        total += w.q * w.element + 4 * w.heads
    if keeps(level, "matmuls"):
        total += (w.q + 2 * w.kv + 2 * w.intermediate + w.adapter_ranks) * w.element
        total += w.hidden * w.residual_element
    if keeps(level, "all"):
        total += 2 * w.hidden * w.element
    return total
