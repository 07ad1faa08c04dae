"""Save levels: what a decoder layer keeps between forward and backward.

Each depth keeps what the one before keeps, and more. Whatever is not kept is rebuilt in backward from the layer's
input, which is always kept. At the levels that begin with "offload" everything kept waits in pinned host memory.

| level                        | kept besides the layer's input                       | rebuilt in backward            |
|------------------------------|------------------------------------------------------|--------------------------------|
| none, offload                | nothing                                              | everything but the down matmul |
| attention, offload-attention | q, k, v, attention output, lse, residual sum, XA     | gate, up                       |
| matmuls, offload-matmuls     | + gate, up, XA                                       | norms, RoPE on normed q/k, act |
| all                          | + norm outputs                                       | activation product             |

Where norms follow the o- and the down-projection, what these gave is kept from "attention" on, and the residual sum,
which the attention's is enough to rebuild, only at "all". Where attention and MLP stand side by side there is no such
sum, and one norm. Of latent attention q, k, v are kept only at "all", up to there the codes in their place: they are
narrow, and make q, k and v again for a fraction of the work.

XA are the adapters' products, a few columns. Per byte kept, all depths save about the same work: a matrix product with
H inputs gives one element for 2 H operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from pronghorn.errors import UnknownSaveLevel, nearest

if TYPE_CHECKING:
    from pronghorn.kernels.linear_cross_entropy import Space

Level = Literal["offload", "none", "offload-attention", "attention", "offload-matmuls", "matmuls", "all"]
LEVELS: tuple[Level, ...] = (
    "offload",
    "none",
    "offload-attention",
    "attention",
    "offload-matmuls",
    "matmuls",
    "all",
)

Depth = Literal["none", "attention", "matmuls", "all"]
DEPTHS: tuple[Depth, ...] = ("none", "attention", "matmuls", "all")
_DEPTH: dict[Level, int] = {
    level: DEPTHS.index(cast(Depth, level.removeprefix("offload-").replace("offload", "none")))
    for level in LEVELS
}


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


def keeps(level: Level, least: Depth) -> bool:
    """Whether `level` keeps what `least` introduces, wherever it lies."""
    return _DEPTH[level] >= DEPTHS.index(least)


def parks(level: Level) -> bool:
    """Whether what the level keeps waits in host memory."""
    return level.startswith("offload")


def is_roomy(levels: Sequence[Level]) -> bool:
    """Whether no layer rebuilds a matrix product: memory is not what is short."""
    return all(keeps(level, "matmuls") and not parks(level) for level in levels)


#: Tiles of the GLU block of at most so many rows are chosen where memory is short.
SHORT_TILES = 1024
#: Tiles of so many rows, which are all rows, are chosen where the loss's chunks find room beside what is kept.
ROOMY_TILES = 1 << 20


def space_of(levels: Sequence[Level], tile_rows: int | None) -> Space:
    """What the loss's chunks may take, by what was chosen for the layers."""
    if is_roomy(levels) or (tile_rows is not None and tile_rows >= ROOMY_TILES):
        return "roomy"
    return "short" if tile_rows is not None and tile_rows <= SHORT_TILES else "usual"


@dataclass(frozen=True)
class LayerWidths:
    """The sizes that decide how many bytes a layer keeps: element counts per token, element size in bytes.

    `attention_ranks` and `glu_ranks` are the summed ranks of the adapters on q, k, v, o and on gate, up, down.
    `output_norms`: norms follow the o- and the down-projection. `router`: logits, where the MLP is a mixture of
    experts, as elements of `element` bytes; `intermediate` and `glu_ranks` are then those of all experts of a token.
    `codes`: of latent attention, what the first products give and the attention's output, kept from "attention" on in
    place of q, k, v and out; what is made of codes, and XA of these products, are `raised`, kept at "all". `parallel`:
    the MLP is beside the attention, with one norm for both and no residual sum between them. `pre_norms`: norms stand
    in front of attention and MLP.
    """

    hidden: int
    q: int
    kv: int
    heads: int
    intermediate: int
    attention_ranks: int
    glu_ranks: int
    element: int
    residual_element: int
    output_norms: bool = False
    router: int = 0
    codes: int | None = None
    raised: int = 0
    parallel: bool = False
    pre_norms: bool = True


def kept_bytes_per_token(level: Level, widths: LayerWidths) -> int:
    """Bytes a token costs in one layer at a save level, layer input included, wherever they lie. Exact; a test holds
    it to the tensors that are kept."""
    w = widths
    total = w.hidden * w.residual_element
    if keeps(level, "attention"):
        heads = 2 * w.q + 2 * w.kv if w.codes is None else w.codes
        total += (heads + w.attention_ranks) * w.element + 4 * w.heads
        if not w.parallel:
            total += 2 * w.hidden * w.element if w.output_norms else w.hidden * w.residual_element
        total += w.router * w.element
    if keeps(level, "matmuls"):
        total += (2 * w.intermediate + w.glu_ranks) * w.element
    if keeps(level, "all"):
        total += (
            (2 - w.parallel) * w.pre_norms * w.hidden + w.raised
        ) * w.element + w.output_norms * w.hidden * w.residual_element
    return total


def saved_bytes_per_token(level: Level, widths: LayerWidths) -> int:
    """What of `kept_bytes_per_token` lies on the device."""
    return 0 if parks(level) else kept_bytes_per_token(level, widths)


def host_bytes_per_token(level: Level, widths: LayerWidths) -> int:
    """What of `kept_bytes_per_token` lies in pinned host memory, and crosses the link twice a step."""
    return kept_bytes_per_token(level, widths) if parks(level) else 0
