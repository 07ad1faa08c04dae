"""fp8 weights that share their input, as one weight [Σout, in]: one product instead of several.

    [Y_1 | Y_2 | …] = X @ [W_1; W_2; …]ᵀ,   Σ_i dY_i @ W_i = [dY_1 | dY_2 | …] @ [W_1; W_2; …]

The input gradients need no sum over [T, in] that way: the row scales of the weights are in dY before it is quantised,
so the weights' products differ in nothing that would keep them apart.

Codes of a group are laid side by side once (`lay_side_by_side`), and every module holds its part of them. Whatever
moves the modules apart (a copy, another device) only makes `stacked` answer None.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pronghorn.weights.base import Weight
from pronghorn.weights.fp8 import Fp8Weight
from pronghorn.weights.fp8_linear import Fp8Linear


def lay_side_by_side(modules: Sequence[Fp8Linear]) -> None:
    """Move the codes and scales of modules with the same input into common storage; rowwise scales only."""
    if len(modules) < 2 or any(module.weight_scale.shape[0] == 1 for module in modules):
        return
    codes = torch.cat([module.weight.data for module in modules])
    scales = torch.cat([module.weight_scale for module in modules])
    kept = [module.weight_transposed for module in modules if module.weight_transposed is not None]
    turned = torch.cat([t.view(torch.uint8) for t in kept], 1) if len(kept) == len(modules) else None
    start = 0
    for module in modules:
        part = slice(start, start + module.out_features)
        module.weight.data, module.weight_scale = codes[part], scales[part]
        if turned is not None:
            module.weight_transposed = turned[:, part].view(torch.float8_e4m3fn)
        start = part.stop


def stacked(weights: Sequence[Weight]) -> Fp8Weight | None:
    """The weights as one [Σout, in], where they lie side by side; else None."""
    if len(weights) < 2:
        return None
    parts = [weight for weight in weights if type(weight) is Fp8Weight and weight.quantises_rows]
    if len(parts) < len(weights):
        return None
    codes = _joined([part.codes for part in parts], 0)
    scales = _joined([part.scales for part in parts], 0)
    if codes is None or scales is None:
        return None
    turned = [part.transposed for part in parts if part.transposed is not None]
    return Fp8Weight(codes, scales, _joined(turned, 1) if len(turned) == len(parts) else None)


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor | None:
    """Views that follow each other in one storage along a dimension, as one view; else None."""
    first = tensors[0]
    storage, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for tensor in tensors:
        apart = tensor.untyped_storage().data_ptr() != storage or tensor.storage_offset() != end
        if apart or tensor.stride() != first.stride():
            return None
        end += tensor.shape[dim] * tensor.stride(dim)
    shape = list(first.shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return first.as_strided(shape, first.stride(), first.storage_offset())
