"""Frozen weights multiplied as 8-bit integers, forward and input gradient (`kernels.int8`).

H is the normalised Hadamard matrix in blocks, H = Hᵀ = H⁻¹; a hat means rounded to codes with a scale a row.

    forward:                  Wf = (W H)^ along in        x @ Wᵀ ≈ (x H)^ @ Wfᵀ      [+ s · XA Bᵀ] [+ residual]
    input gradient:           Wb = (Wᵀ H)^ along out      dy @ W ≈ (dy H)^ @ Wbᵀ     [+ dXA A] [+ residual]
    the same with one copy:   Wf = s C                    dy @ W ≈ ((dy · sᵀ)^ @ C [+ dXA (A H)]) H

What is in brackets is added where the product is scaled and written, in one launch (`Weight.fuses`). Weights of a group
share the scales of Wb, so that dY of all of them, side by side, is quantised once and multiplied at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pronghorn.kernels.fp8 import E4M3, transpose_codes
from pronghorn.kernels.int8 import Codes, dequantise, product, rotate
from pronghorn.kernels.lora import LowRank
from pronghorn.weights.adjacent import side_by_side
from pronghorn.weights.base import Weight
from pronghorn.weights.operand import Operand, as_operand, rows_of


class Int8Weight(Weight):
    """Stored as int8.

    Args:
        codes: [out, in] of W H. scales: fp32 [out, 1].
        back: codes [in, out] (columns of a group's, rows may be strided) and scales [in, 1] of Wᵀ H for the input
            gradient, or None to transpose `codes` in every one.
    """

    label = "quantised"
    adds_forward = adds_input_grad = False
    fuses = True

    def __init__(self, codes: Tensor, scales: Tensor, back: Codes | None = None) -> None:
        self.codes, self.scales, self.back = codes, scales, back
        self.shape = (codes.shape[0], codes.shape[1])
        self.storage = "int8" if back is None else "int8 two"

    def dense(self, dtype: torch.dtype) -> Tensor:
        return dequantise(self.codes, self.scales, dtype)

    def operand_of(self, dys: Sequence[Tensor]) -> Operand:
        """The operand of the input gradient of a stack: dY_i [T, out_i] of its parts, quantised side by side."""
        return Operand.joined_int8(dys, None if self.back is not None else self.scales)

    # --- products ------------------------------------------------------------------------------------------------

    def matmul(self, x: Tensor | Operand, bias: Tensor | None = None) -> Tensor:
        return self.matmul_fused(x, bias=bias)

    def matmul_add_(self, out: Tensor, x: Tensor | Operand) -> Tensor:
        return out.add_(self.matmul(x))

    def matmul_t(self, dy: Tensor | Operand) -> Tensor:
        return self.matmul_t_fused(dy)

    def matmul_t_add_(self, out: Tensor, dy: Tensor | Operand) -> Tensor:
        return out.add_(self.matmul_t(dy))

    def matmul_fused(
        self,
        x: Tensor | Operand,
        low_rank: LowRank | None = None,
        residual: Tensor | None = None,
        bias: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        y = product(
            as_operand(x).int8(),
            (self.codes, self.scales),
            low_rank=low_rank,
            residual=residual,
            dtype=rows_of(x).dtype,
            out=out,
        )
        return y if bias is None else y.add_(bias)

    def matmul_t_fused(
        self, dy: Tensor | Operand, low_rank: LowRank | None = None, residual: Tensor | None = None
    ) -> Tensor:
        operand, dtype = as_operand(dy), rows_of(dy).dtype
        if self.back is not None:
            return product(operand.int8(), self.back, low_rank=low_rank, residual=residual, dtype=dtype)
        # A byte is a byte: the kernel that turns e4m3 round turns these.
        turned = transpose_codes(self.codes.view(E4M3)).view(torch.int8)
        ones = torch.ones(turned.shape[0], 1, device=turned.device)
        if low_rank is not None:
            low_rank = low_rank._replace(b=rotate(low_rank.b.t().contiguous()).t())
        dx = product(operand.int8(self.scales), (turned, ones), low_rank=low_rank, dtype=dtype)
        dx = rotate(dx)
        return dx if residual is None else residual + dx


def stacked_int8(parts: Sequence[Int8Weight]) -> Int8Weight | None:
    """Weights that lie side by side (`int8_linear.Int8Linear.group`) as one [Σout, in]; else None."""
    codes = side_by_side([part.codes for part in parts], 0)
    scales = side_by_side([part.scales for part in parts], 0)
    backs = [part.back for part in parts if part.back is not None]
    if codes is None or scales is None or len(backs) not in (0, len(parts)):
        return None
    if not backs:
        return Int8Weight(codes, scales)
    back, shared = side_by_side([back for back, _ in backs], 1), backs[0][1]
    if back is None or any(other.data_ptr() != shared.data_ptr() for _, other in backs):
        return None
    return Int8Weight(codes, scales, (back, shared))
