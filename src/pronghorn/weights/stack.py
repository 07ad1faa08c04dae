"""Weights that share their input, as one weight [Σout, in]: one product instead of several.

    [Y_1 | Y_2 | …] = X @ [W_1; W_2; …]ᵀ,   Σ_i dY_i @ W_i = [dY_1 | dY_2 | …] @ [W_1; W_2; …]

Fewer launches, whole waves of the matrix units, and no sum of the input gradients over [T, in]. In fp8 the row scales
of the weights are in dY before it is quantised, so their products differ in nothing that would keep them apart.

Weights of a group are laid side by side once (`lay_side_by_side`, `join`), and every module holds its part of them.
Whatever moves the modules apart (a copy, another device, a weight put in its place) only makes `stacked` answer None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from pronghorn.kernels.fp8 import exponents_of
from pronghorn.weights.adjacent import held_by, side_by_side
from pronghorn.weights.base import DenseWeight, Weight
from pronghorn.weights.fp8 import Fp8Weight
from pronghorn.weights.fp8_linear import Fp8Linear
from pronghorn.weights.int8 import Int8Products, stacked_int8
from pronghorn.weights.quantised import FourBitWeight

#: attribute of tensors that stay where they lie (`keep_in_place`)
_IN_PLACE = "pronghorn_in_place"


def lay_side_by_side(modules: Sequence[Fp8Linear]) -> None:
    """Move the codes and scales of modules with the same input into common storage; rowwise scales only."""
    if len(modules) < 2 or any(module.weight_scale.shape[0] == 1 for module in modules):
        return
    codes = torch.cat([module.weight.data for module in modules])
    scales = torch.cat([module.weight_scale for module in modules])
    exponents = exponents_of(scales).view(-1)
    kept = [module.weight_transposed for module in modules if module.weight_transposed is not None]
    turned = torch.cat([t.view(torch.uint8) for t in kept], 1) if len(kept) == len(modules) else None
    start = 0
    for module in modules:
        part = slice(start, start + module.out_features)
        module.weight.data, module.weight_scale = codes[part], scales[part]
        module.weight_exponents = exponents[part]
        if turned is not None:
            module.weight_transposed = turned[:, part].view(torch.float8_e4m3fn)
        start = part.stop


def join(weights: Sequence[Weight], *, answering: bool = False) -> bool:
    """Move frozen plain weights with the same input into common storage; True where they lie so now.

    Parameters stay the objects they are and read the same; in between, the group's weights exist twice. A weight that
    is itself a part of something, or trained, stays where it is, and the others with it.

    Args:
        answering: they are read by answers alone, so that those that could be trained move, too, but for what has a
            gradient.
    """
    if stacked(weights, answering=answering) is not None:
        return True
    plain = len(weights) > 1 and all(_is_plain(weight, answering) for weight in weights)
    return plain and join_tensors(
        [cast(DenseWeight, weight).weight for weight in weights], answering=answering
    )


def join_tensors(tensors: Sequence[Tensor], *, answering: bool = False) -> bool:
    """`join` for tensors such as biases: along their first dimension."""
    if not _may_join(tensors, answering):
        return False
    with torch.no_grad():
        wide = torch.cat([tensor.data for tensor in tensors])
        for tensor, part in zip(tensors, wide.split([t.shape[0] for t in tensors]), strict=True):
            tensor.data = part
    return True


def keep_in_place(tensors: Iterable[Tensor]) -> None:
    """Have `join` and `gather` leave these tensors where they are: other processes read them there, and each would make
    a copy."""
    for tensor in tensors:
        setattr(tensor, _IN_PLACE, True)


def stays_in_place(tensor: Tensor) -> bool:
    """Whether `keep_in_place` was asked for a tensor."""
    return hasattr(tensor, _IN_PLACE)


def _is_plain(weight: Weight, answering: bool) -> bool:
    return type(weight) is DenseWeight and (answering or weight.parameter is None)


def _may_join(tensors: Sequence[Tensor], answering: bool) -> bool:
    first = tensors[0]
    alike = all(t.dtype == first.dtype and t.device == first.device for t in tensors)
    whole = all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in tensors)
    trained = any(t.requires_grad and not (answering and _rests(t)) for t in tensors)
    free = not trained and not any(map(stays_in_place, tensors))
    return free and alike and whole and len({t.untyped_storage()._cdata for t in tensors}) == len(tensors)


def _rests(tensor: Tensor) -> bool:
    """Whether one that could be trained has no gradient, and nobody else reads its memory, who would lose its track."""
    return tensor.is_leaf and tensor.grad is None and held_by(tensor.untyped_storage(), 1)


def stacked(
    weights: Sequence[Weight], *, answering: bool = False
) -> DenseWeight | Fp8Weight | Int8Products | None:
    """The weights as one [Σout, in], where they lie side by side; else None. `answering`: as for `join`."""
    if len(weights) < 2:
        return None
    if all(_is_plain(weight, answering) for weight in weights):
        wide = side_by_side([cast(DenseWeight, weight).weight.detach() for weight in weights], 0)
        return None if wide is None else DenseWeight(wide)
    kept = [weight.kept for weight in weights if type(weight) is FourBitWeight and weight.kept is not None]
    if len(kept) == len(weights) and not answering:
        # Answers read the 4 bits themselves.
        wide = side_by_side(kept, 0)
        return None if wide is None else DenseWeight(wide)
    if all(isinstance(weight, Int8Products) for weight in weights):
        return stacked_int8(weights)
    parts = [weight for weight in weights if type(weight) is Fp8Weight and weight.quantises_rows]
    return _stacked_fp8(parts) if len(parts) == len(weights) else None


def _stacked_fp8(parts: Sequence[Fp8Weight]) -> Fp8Weight | None:
    codes = side_by_side([part.codes for part in parts], 0)
    scales = side_by_side([part.scales for part in parts], 0)
    if codes is None or scales is None:
        return None
    turned = [part.transposed for part in parts if part.transposed is not None]
    exponents = [part.exponents for part in parts if part.exponents is not None]
    return Fp8Weight(
        codes,
        scales,
        side_by_side(turned, 1) if len(turned) == len(parts) else None,
        side_by_side(exponents, 0) if len(exponents) == len(parts) else None,
    )
