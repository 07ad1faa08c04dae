"""A linear module whose frozen weight is stored as int8 codes; what Transformers and PEFT hold in a loaded model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.kernels.int8 import (
    Codes,
    dequantise,
    quantise_weight,
    quantise_weight_input_grad,
    rotation_of,
)
from pronghorn.weights.dequantised import StoredLinear
from pronghorn.weights.int8 import Int8Weight


class Int8Linear(StoredLinear):
    """y = x Wᵀ + b with W = (codes · scales) turned back (`weights.int8`)."""

    weight: nn.Parameter
    #: fp32 [out, 1]
    weight_scale: Tensor
    #: codes for the input gradient [in, out], often columns of a group's, and their scales fp32 [in, 1]
    weight_back: Tensor | None
    weight_back_scale: Tensor | None

    def __init__(
        self, forward: Codes, back: Codes | None, bias: nn.Parameter | None, dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        codes, scales = forward
        self.out_features, self.in_features = codes.shape
        self.compute_dtype = dtype
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = bias
        self.register_buffer("weight_scale", scales)
        # Kept with the model's state: the codes of the other direction do not give them.
        self.register_buffer("weight_back", None if back is None else back[0])
        self.register_buffer("weight_back_scale", None if back is None else back[1])

    @staticmethod
    def group(
        linears: Sequence[nn.Linear], *, copies: int = 2, device: torch.device | None = None
    ) -> list[Int8Linear]:
        """Modules with the same input quantised, their codes side by side on `device` (None: where they are).

        The originals are not changed. With two copies those for the input gradient share their scales, where the blocks
        that are turned fit into each module's outputs.
        """
        weights = [linear.weight.detach() for linear in linears]
        weights = [weight.to(device or weight.device) for weight in weights]
        forward = _side_by_side([quantise_weight(weight) for weight in weights])
        back = _backs(weights) if copies == 2 else [None] * len(weights)
        return [
            Int8Linear(codes, turned, linear.bias, weight.dtype).train(linear.training)
            for linear, weight, codes, turned in zip(linears, weights, forward, back, strict=True)
        ]

    @staticmethod
    def of(linear: nn.Linear, *, copies: int = 2, device: torch.device | None = None) -> Int8Linear:
        """One module quantised on its own."""
        return Int8Linear.group([linear], copies=copies, device=device)[0]

    def stored(self) -> Int8Weight:
        turned, scales = self.weight_back, self.weight_back_scale
        back = None if turned is None or scales is None else (turned, scales)
        return Int8Weight(self.weight.detach(), self.weight_scale, back)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [out, in] in 16 or 32 bits."""
        return dequantise(self.weight.detach(), self.weight_scale, dtype or self.compute_dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves codes and scales, and casts neither: 16 bits do not hold a scale exactly."""
        scales = self.weight_scale, self.weight_back_scale
        result = super()._apply(fn, recurse)
        moved = [_uncast(fn, before, after) for before, after in zip(
            scales, (self.weight_scale, self.weight_back_scale), strict=True
        )]  # fmt: skip
        assert moved[0] is not None
        self.weight_scale, self.weight_back_scale = moved[0], moved[1]
        return result


def fits_int8(linear: nn.Module) -> bool:
    """Whether a module is a plain linear one whose rows and columns can be turned in blocks."""
    return (
        type(linear) is nn.Linear
        and rotation_of(linear.in_features) > 0
        and rotation_of(linear.out_features) > 0
        and linear.weight.is_floating_point()
    )


def _side_by_side(parts: list[Codes]) -> list[Codes]:
    """Codes and scales as slices of common ones."""
    if len(parts) == 1:
        return parts
    sizes = [codes.shape[0] for codes, _ in parts]
    codes, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return list(zip(codes.split(sizes), scales.split(sizes), strict=True))


def _backs(weights: Sequence[Tensor]) -> list[Codes | None]:
    """Codes for the input gradient of each weight: columns of those of all, or its own."""
    sizes = [weight.shape[0] for weight in weights]
    block = rotation_of(sum(sizes))
    if block == 0 or any(size % block for size in sizes):
        return [quantise_weight_input_grad([weight]) for weight in weights]
    codes, scales = quantise_weight_input_grad(weights)
    return [(part, scales) for part in codes.split(sizes, 1)]


def _uncast(fn: Callable[[Tensor], Tensor], before: Tensor | None, after: Tensor | None) -> Tensor | None:
    """`before` where `after` is, in fp32."""
    if before is None or after is None or after.dtype == torch.float32:
        return after
    return before.to(after.device)
