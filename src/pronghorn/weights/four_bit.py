"""bitsandbytes' 4-bit modules: what their products multiply, and keeping that where memory is free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels.fp8 import E4M3, MULTIPLE, four_bit_row_scales
from pronghorn.kernels.int8 import quantise_weight, quantise_weight_input_grad, rotation_of
from pronghorn.kernels.nf4 import dequantize_4bit
from pronghorn.weights.fp8 import Fp8FourBitWeight
from pronghorn.weights.fp8_linear import FP8_SCALES
from pronghorn.weights.int8 import Int8FourBitWeight, stacked_int8
from pronghorn.weights.quantised import FourBitWeight

#: buffers on modules that multiply int8: scales of either direction, as bytes, which casts of a whole model leave alone
INT8_SCALES = "pronghorn_int8_scales"
INT8_BACK_SCALES = "pronghorn_int8_back_scales"
#: buffers with what the products multiply, kept (`keep_expanded`)
EXPANDED = "pronghorn_expanded"
EXPANDED_TRANSPOSED = "pronghorn_expanded_transposed"


def four_bit_weight(module: Any) -> FourBitWeight | Int8FourBitWeight:
    """The weight of a bitsandbytes 4-bit module that has been quantised."""
    packed, buffers = module.weight.data, module._buffers
    state = getattr(module.weight, "quant_state", None) or module.quant_state
    kept, transposed = buffers.get(EXPANDED), buffers.get(EXPANDED_TRANSPOSED)
    both = None if kept is None or transposed is None else (kept, transposed)
    if INT8_SCALES in buffers:
        scales, back = (buffers[name].view(torch.float32) for name in (INT8_SCALES, INT8_BACK_SCALES))
        codes = None if both is None else (both[0].view(torch.int8), both[1].view(torch.int8))
        return Int8FourBitWeight(
            [FourBitWeight(packed, state)], scales, back, module.pronghorn_int8_block, codes
        )
    if FP8_SCALES in buffers:
        fp8 = (None, None) if both is None else (both[0].view(E4M3), both[1].view(E4M3))
        return Fp8FourBitWeight(packed, state, buffers[FP8_SCALES], *fp8)
    dense = None if kept is None else kept.view(module.compute_dtype or torch.bfloat16)
    return FourBitWeight(packed, state, dense)


def add_fp8_products(module: Any, *, rowwise: bool = True) -> bool:
    """Let a 4-bit module multiply in fp8; False where its blocks do not divide its rows."""
    weight = FourBitWeight(module.weight.data, module.weight.quant_state)
    if weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE:
        return False
    scales = four_bit_row_scales(weight.bits)
    if scales is None:
        return False
    module.register_buffer(FP8_SCALES, scales if rowwise else scales.amax().view(1, 1), persistent=False)
    return True


def add_int8_products(modules: Sequence[Any]) -> None:
    """Let 4-bit modules with the same input multiply in int8 (`fits_int8_products` each): makes their scales.

    Their output gradients are turned side by side where H's blocks fit into each module's outputs, else each alone.
    """
    weights = [FourBitWeight(module.weight.data, module.weight.quant_state) for module in modules]
    block = rotation_of(sum(weight.shape[0] for weight in weights))
    if len(modules) > 1 and (not block or any(weight.shape[0] % block for weight in weights)):
        for module in modules:
            add_int8_products([module])
        return
    dense = [
        weight.dense(module.compute_dtype or torch.bfloat16)
        for weight, module in zip(weights, modules, strict=True)
    ]
    scales = torch.cat([quantise_weight(weight)[1] for weight in dense])
    _, back = quantise_weight_input_grad(dense)
    for module, part in zip(modules, scales.split([weight.shape[0] for weight in weights]), strict=True):
        module.register_buffer(INT8_SCALES, part.view(torch.uint8), persistent=False)
        module.register_buffer(INT8_BACK_SCALES, back.view(torch.uint8), persistent=False)
        module.pronghorn_int8_block = block


def is_four_bit(module: Any) -> bool:
    """Whether a module holds 4 bits itself: PEFT's wrapper of such a module hands its weight on."""
    return getattr(module._parameters.get("weight"), "quant_state", None) is not None


def fits_int8_products(module: Any) -> bool:
    """Whether a module holds 4 bits, and its rows and columns can be turned in blocks."""
    state = getattr(module._parameters.get("weight"), "quant_state", None)
    return state is not None and rotation_of(state.shape[0]) > 0 and rotation_of(state.shape[1]) > 0


def keep_expanded(modules: Iterable[Any], keep: bool) -> int:
    """Hold what the products of 4-bit modules are made of beside their 4 bits, or let it go; for when memory is free.

    That is the dequantised weight in the compute dtype, or for 8-bit products the codes in both directions: the values
    that the modules compute with anyway. Codes of modules that multiply as one lie side by side.

    Returns:
        the bytes that are held.
    """
    left, held = list(modules), 0
    for module in left:
        for name in (EXPANDED, EXPANDED_TRANSPOSED):
            module._buffers.pop(name, None)
    while keep and left:
        group = _multiplied_as_one(left)
        del left[: len(group)]
        held += _hold_expanded(group)
    return held


def _multiplied_as_one(modules: Sequence[Any]) -> list[Any]:
    """The first of the modules, and those after it whose int8 products are made with its; of modules that multiply in
    16 bits those that read as many columns, q, k and v or gate and up among them."""
    weights = [four_bit_weight(modules[0])]
    for module in modules[1:]:
        weight = four_bit_weight(module)
        plain = type(weight) is type(weights[0]) is FourBitWeight and _dtype_of(module) == _dtype_of(
            modules[0]
        )
        if not (plain and weight.shape[1] == weights[0].shape[1]) and not stacked_int8([*weights, weight]):
            break
        weights.append(weight)
    return list(modules[: len(weights)])


def _dtype_of(module: Any) -> torch.dtype:
    """Of a 4-bit module's products in 16 bits."""
    return module.compute_dtype or torch.bfloat16


def _hold_expanded(group: Sequence[Any]) -> int:
    """Register what the products of modules multiplied as one are made of; returns its bytes."""
    weights = [four_bit_weight(module) for module in group]
    whole = weights[0] if len(weights) == 1 else stacked_int8(weights)
    tensors: list[Sequence[Tensor]]
    if isinstance(whole, Int8FourBitWeight):
        sizes = [weight.shape[0] for weight in weights]
        (codes, _), (back, _) = whole.codes_forward(), whole.codes_input_grad()
        tensors = list(zip(codes.split(sizes), back.split(sizes, 1), strict=True))
    elif isinstance(whole, Fp8FourBitWeight):
        tensors = [(whole.codes_forward(), whole.codes_input_grad())]
    else:
        tensors = [(part,) for part in _side_by_side(weights, _dtype_of(group[0]))]
    for module, parts in zip(group, tensors, strict=True):
        for name, tensor in zip((EXPANDED, EXPANDED_TRANSPOSED), parts, strict=False):
            # As bytes, which casts of the whole model leave alone.
            module.register_buffer(name, tensor.view(torch.uint8), persistent=False)
    return sum(tensor.nbytes for parts in tensors for tensor in parts)


def _side_by_side(
    weights: Sequence[FourBitWeight | Int8FourBitWeight], dtype: torch.dtype
) -> Sequence[Tensor]:
    """The dequantised weights as rows of one matrix, so that those with the same input can be multiplied as one."""
    plain = [weight for weight in weights if isinstance(weight, FourBitWeight)]
    rows, columns = [weight.shape[0] for weight in plain], plain[0].shape[1]
    wide = torch.empty(sum(rows), columns, dtype=dtype, device=plain[0].packed.device)
    parts = wide.split(rows)
    for weight, part in zip(plain, parts, strict=True):
        dequantize_4bit(weight.bits, dtype, out=part)
    return parts
