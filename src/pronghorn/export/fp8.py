"""A merged checkpoint with its linear layers in e4m3, as stock Transformers and vLLM read it.

The format is the one of published fp8 checkpoints (`quant_method: "fp8"`, Transformers' FineGrainedFP8): each block of
B x B weights has a scale in fp32,

    W ≈ weight · weight_scale_inv      weight_scale_inv = max|W| / 448 over the block

and activations are quantised as they come. Embeddings, head, norms and biases stay in 16 bits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.engine import base_causal_lm
from pronghorn.errors import NotExportable
from pronghorn.export.merge import Plan, plan_merge
from pronghorn.export.safetensors_file import Entry
from pronghorn.kernels.fp8 import E4M3, E4M3_MAX

#: Sides of a block, largest first: 128 is what published checkpoints have, the others are for widths 128 does not
#: divide.
SIDES = (128, 64, 32)
SCALES = "_scale_inv"


def plan_fp8(model: Any) -> tuple[Plan, dict[str, Any]]:
    """Plan the checkpoint, and its `quantization_config`. No weight is computed yet.

    Raises:
        NotExportable: for a mixture of experts, or linear layers whose sizes no block divides.
    """
    plan, exact = plan_merge(model), plan_merge(model, torch.float32)
    linear, kept = _linear_layers(model)
    in_fp32 = {entry.name: entry for entry in exact.entries}
    chosen = [entry.name for entry in plan.entries if entry.name in linear]
    side = _side([in_fp32[name].shape for name in chosen])
    entries: list[Entry] = []
    for entry in plan.entries:
        entries += _quantised(in_fp32[entry.name], side) if entry.name in linear else [entry]
    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [side, side],
        "modules_to_not_convert": kept,
    }
    return Plan(entries, plan.ties_broken), config


def _linear_layers(model: Any) -> tuple[set[str], list[str]]:
    """(weights of linear layers but the head, the modules that Transformers is to leave alone).

    Raises:
        NotExportable: for a mixture of experts.
    """
    base = base_causal_lm(model)
    config = copy.deepcopy(base.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        stock = type(base)(config)
    if any(name.endswith(".experts") for name, _ in stock.named_modules()):
        raise NotExportable(
            "a mixture of experts has no fp8 form here", fix="save_method='merged_16bit' keeps every weight"
        )
    head = stock.get_output_embeddings()
    kept = [name for name, module in stock.named_modules() if module is head]
    linear = {
        f"{name}.weight"
        for name, module in stock.named_modules()
        if type(module) is nn.Linear and module is not head
    }
    return linear, kept


def _side(shapes: Sequence[tuple[int, ...]]) -> int:
    """The largest block that divides every matrix.

    Raises:
        NotExportable: where none does.
    """
    found = [side for side in SIDES if all(size % side == 0 for shape in shapes for size in shape)]
    if not shapes or not found:
        odd = next((s for s in shapes if any(size % SIDES[-1] for size in s)), ())
        raise NotExportable(
            f"fp8 scales are for blocks of {' or '.join(map(str, SIDES))}, and none of them divides all linear layers"
            + (f" ({' x '.join(map(str, odd))})" if odd else ""),
            fix="use save_method='merged_16bit' or 'merged_4bit'",
        )
    return found[0]


def _quantised(exact: Entry, side: int) -> list[Entry]:
    """Codes and scales of a weight that is made in fp32. Each makes the weight anew: memory holds one at a time."""
    grid = tuple(size // side for size in exact.shape)
    return [
        Entry(exact.name, exact.shape, E4M3, lambda: quantise_blocks(exact.make(), side)[0]),
        Entry(f"{exact.name}{SCALES}", grid, torch.float32, lambda: block_scales(exact.make(), side)),
    ]


def block_scales(weight: Tensor, side: int) -> Tensor:
    """max|W| / 448 over blocks [out / side, in / side] fp32; 1 for a block of zeros."""
    rows, columns = weight.shape
    largest = weight.view(rows // side, side, columns // side, side).abs().amax(dim=(1, 3)).float()
    return torch.where(largest > 0, largest / E4M3_MAX, 1.0)


def quantise_blocks(weight: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """(codes e4m3 [out, in], scales fp32 [out / side, in / side]) of an fp32 weight."""
    rows, columns = weight.shape
    scales = block_scales(weight, side)
    blocks = weight.view(rows // side, side, columns // side, side) / scales[:, None, :, None]
    # A quotient may be a rounding error above 448, which e4m3 has no infinity for.
    return blocks.clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3).view(rows, columns), scales
