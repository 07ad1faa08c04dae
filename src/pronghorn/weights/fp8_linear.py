"""A linear module whose frozen weight is stored as e4m3 codes; what Transformers and PEFT hold in a loaded model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.kernels.fp8 import (
    E4M3,
    MULTIPLE,
    dequantise,
    exponents_of,
    quantise_weight,
    transpose_codes,
)
from pronghorn.weights.dequantised import StoredLinear
from pronghorn.weights.fp8 import Fp8Weight

#: buffers on stock modules whose weight is multiplied in fp8: row scales, and the bytes of the transposed codes
FP8_SCALES = "pronghorn_fp8_scales"
FP8_TRANSPOSED = "pronghorn_fp8_transposed"


class Fp8Linear(StoredLinear):
    """y = x Wᵀ + b with W = codes · scales.

    `weight` holds the codes as bytes, which casts of a whole model (`model.half()`) leave alone.
    """

    weight: nn.Parameter
    weight_scale: Tensor
    #: int8 e with weight_scale = 2^e; None for one scale of the whole matrix
    weight_exponents: Tensor | None
    weight_transposed: Tensor | None

    def __init__(self, codes: Tensor, scales: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = codes.shape
        self.compute_dtype = dtype
        self.weight = nn.Parameter(codes.view(torch.uint8), requires_grad=False)
        self.bias = bias
        self.register_buffer("weight_scale", scales)
        self.register_buffer("weight_exponents", None, persistent=False)
        self.register_buffer("weight_transposed", None, persistent=False)
        self.renew_exponents()

    @staticmethod
    def of(linear: nn.Linear, *, rowwise: bool = True, device: torch.device | None = None) -> Fp8Linear:
        """A linear module quantised, its weight on `device` (None: where it is); the original is not changed."""
        weight = linear.weight.detach()
        codes, scales = quantise_weight(weight.to(device or weight.device), rowwise=rowwise)
        module = Fp8Linear(codes, scales, linear.bias, weight.dtype)
        return module.train(linear.training)

    @property
    def codes(self) -> Tensor:
        """e4m3 [out, in]."""
        return self.weight.detach().view(E4M3)

    def stored(self) -> Fp8Weight:
        return Fp8Weight(self.codes, self.weight_scale, self.weight_transposed, self.weight_exponents)

    def renew_exponents(self) -> None:
        """Read the scales' exponents, which the input gradient's kernels take: a byte a row."""
        rowwise = self.weight_scale.shape[0] > 1
        self.weight_exponents = exponents_of(self.weight_scale).view(-1) if rowwise else None

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [out, in] in 16 or 32 bits."""
        return dequantise(self.codes, self.weight_scale, dtype or self.compute_dtype)

    def keep_transposed(self, keep: bool) -> None:
        """Hold the codes a second time as [in, out] (a faster input gradient) or let the second copy go."""
        self.weight_transposed = transpose_codes(self.codes) if keep else None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, e4m3"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.renew_exponents()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        # A cast of the model reaches the scales; they are powers of two, which bf16 holds exactly.
        self.weight_scale = self.weight_scale.to(torch.float32)
        return result


def add_fp8_input_grad(linear: nn.Linear, *, rowwise: bool = True, keep_codes: bool = False) -> None:
    """Let a frozen plain module's input gradient run in fp8; again after its weight has changed (a merge).

    Args:
        keep_codes: hold the codes, a byte a weight; else each input gradient makes them from the 16-bit weight.
    """
    codes, scales = quantise_weight(linear.weight.detach(), rowwise=rowwise)
    linear.register_buffer(FP8_SCALES, scales, persistent=False)
    # As bytes, which casts of the whole model leave alone.
    kept = transpose_codes(codes).view(torch.uint8) if keep_codes else None
    linear.register_buffer(FP8_TRANSPOSED, kept, persistent=False)


def renew_fp8_input_grads(model: nn.Module) -> None:
    """Make the scales and codes of `add_fp8_input_grad` again, for weights that something was merged into."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and FP8_TRANSPOSED in module._buffers:
            scales = module._buffers[FP8_SCALES]
            assert scales is not None
            keep = module._buffers[FP8_TRANSPOSED] is not None
            add_fp8_input_grad(module, rowwise=scales.shape[0] > 1, keep_codes=keep)


def fits_fp8(linear: nn.Module) -> bool:
    """Whether a module is a plain linear one of a shape that fp8 matrix units take."""
    return (
        type(linear) is nn.Linear
        and linear.in_features % MULTIPLE == 0
        and linear.out_features % MULTIPLE == 0
        and linear.weight.is_floating_point()
    )
