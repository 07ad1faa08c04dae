"""Frozen weights multiplied in 8-bit floating point, forward and input gradient.

    W ≈ s ⊙ C:   x @ Wᵀ = (x̂ @ Cᵀ) · sᵀ,   dy @ W = (dy · s) @ C

C are e4m3 codes [out, in] and s one power of two an output row. Both products multiply the same codes: the input
gradient puts s into dy before that is quantised, because a matrix unit can scale only rows of its operands. It also
wants its second operand contiguous along the summed index, which for the input gradient is Cᵀ: either kept beside C
(fast) or made for each use (half the memory).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels.fp8 import dequantise, four_bit_to_fp8, product, quantise_transposed, transpose_codes
from pronghorn.weights.base import DenseWeight, Weight
from pronghorn.weights.operand import Operand, as_operand, rows_of
from pronghorn.weights.quantised import FourBitWeight


def _input_grad(
    dy: Tensor | Operand, transposed: Tensor, scales: Tensor, fast: bool, exponents: Tensor | None = None
) -> Tensor:
    """dy [T, out] @ (scales ⊙ C) for transposed = Cᵀ [in, out]."""
    columns = scales if exponents is None else exponents
    by_row = scales.shape[0] > 1
    rows = as_operand(dy).fp8(columns if by_row else None, rowwise=by_row)
    return product(rows, transposed, None if by_row else scales, rows_of(dy).dtype, fast=fast)


class _Fp8Products(Weight):
    """The products of weights that give their codes; see the module's docstring."""

    label = "quantised"
    adds_forward = adds_input_grad = False
    #: fp32 [out, 1], or [1, 1] where the matrix units scale whole tensors only
    scales: Tensor
    #: add up in fewer bits, forward and in the input gradient
    fast_forward = True
    fast_input_grad = True
    #: int8 e with scales = 2^e, where somebody has read them
    exponents: Tensor | None = None

    @property
    def quantises_rows(self) -> bool:
        return self.scales.shape[0] > 1

    @property
    def columns(self) -> Tensor:
        """What multiplies the columns of dy before they are quantised, as `kernels.fp8.quantise_rows` takes it."""
        return self.scales if self.exponents is None else self.exponents

    def codes_forward(self) -> Tensor:
        """C [out, in], contiguous along in."""
        raise NotImplementedError

    def codes_input_grad(self) -> Tensor:
        """Cᵀ [in, out], contiguous along out."""
        raise NotImplementedError

    def matmul(self, x: Tensor | Operand, bias: Tensor | None = None) -> Tensor:
        rows = as_operand(x).fp8(rowwise=self.quantises_rows)
        y = product(rows, self.codes_forward(), self.scales, rows_of(x).dtype, fast=self.fast_forward)
        return y if bias is None else y.add_(bias)

    def matmul_add_(self, out: Tensor, x: Tensor | Operand) -> Tensor:
        return out.add_(self.matmul(x))

    def matmul_t(self, dy: Tensor | Operand) -> Tensor:
        return _input_grad(dy, self.codes_input_grad(), self.scales, self.fast_input_grad, self.exponents)

    def matmul_t_add_(self, out: Tensor, dy: Tensor | Operand) -> Tensor:
        return out.add_(self.matmul_t(dy))


class Fp8Weight(_Fp8Products):
    """Stored as e4m3.

    Args:
        codes: [out, in]. scales: fp32 [out, 1] or [1, 1].
        transposed: the codes once more as [in, out], or None to transpose them in every input gradient.
        exponents: int8 e [out] with scales = 2^e.
    """

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        transposed: Tensor | None = None,
        exponents: Tensor | None = None,
    ) -> None:
        self.codes, self.scales, self.transposed, self.exponents = codes, scales, transposed, exponents
        self.shape = (codes.shape[0], codes.shape[1])
        self.storage = "fp8" if transposed is None else "fp8 two"

    def dense(self, dtype: torch.dtype) -> Tensor:
        return dequantise(self.codes, self.scales, dtype)

    def codes_forward(self) -> Tensor:
        return self.codes

    def codes_input_grad(self) -> Tensor:
        return transpose_codes(self.codes) if self.transposed is None else self.transposed


class Fp8GradWeight(DenseWeight):
    """Stored in 16 bits and multiplied so in forward; the input gradient runs in fp8.

    Outputs and loss are exact. What reaches the adapters below differs by the rounding of dy and of W, which a model's
    gradients bear far better than its activations do.

    Args:
        weight: [out, in], frozen. scales: fp32 [out, 1] or [1, 1].
        transposed: its codes as [in, out], or None to make them in every input gradient.
    """

    label = "quantised"
    adds_input_grad = False
    fast_input_grad = True

    def __init__(self, weight: Tensor, scales: Tensor, transposed: Tensor | None) -> None:
        super().__init__(weight)
        self.scales, self.transposed = scales, transposed
        self.storage = f"{self.storage}, input gradient in fp8"

    def ready(self, dtype: torch.dtype) -> None:
        """Its products do not both read the weight as it lies."""
        return

    def matmul_t(self, dy: Tensor | Operand) -> Tensor:
        return _input_grad(dy, self.codes_input_grad(), self.scales, self.fast_input_grad)

    def codes_input_grad(self) -> Tensor:
        """The weight's codes as [in, out]."""
        if self.transposed is not None:
            return self.transposed
        return quantise_transposed(self.weight.detach(), self.scales)

    def matmul_t_add_(self, out: Tensor, dy: Tensor | Operand) -> Tensor:
        return out.add_(self.matmul_t(dy))


class Fp8FourBitWeight(_Fp8Products, FourBitWeight):
    """Stored in 4 bits, expanded to e4m3 for each product.

    Args:
        scales: fp32 [out, 1], `kernels.fp8.four_bit_row_scales` of the weight; or [1, 1].
        codes, transposed: e4m3 [out, in] and [in, out] where they are kept.
    """

    def __init__(
        self,
        packed: Tensor,
        state: Any,
        scales: Tensor,
        codes: Tensor | None = None,
        transposed: Tensor | None = None,
    ) -> None:
        super().__init__(packed, state)
        self.scales, self.codes, self.transposed = scales, codes, transposed
        self.storage = f"{self.storage} in fp8 products"

    def codes_forward(self) -> Tensor:
        return self._codes(transposed=False) if self.codes is None else self.codes

    def codes_input_grad(self) -> Tensor:
        return self._codes(transposed=True) if self.transposed is None else self.transposed

    def _codes(self, transposed: bool) -> Tensor:
        return four_bit_to_fp8(self.bits, self.scales.expand(self.shape[0], 1), transposed=transposed)
