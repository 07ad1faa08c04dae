"""Frozen weights multiplied as 8-bit integers, forward and input gradient (`kernels.int8`).

H is the normalised Hadamard matrix in blocks, H = Hᵀ = H⁻¹; a hat means rounded to codes with a scale a row.

    forward:                  Wf = (W H)^ along in        x @ Wᵀ ≈ (x H)^ @ Wfᵀ      [+ s · XA Bᵀ] [+ residual]
    input gradient:           Wb = (Wᵀ H)^ along out      dy @ W ≈ (dy H)^ @ Wbᵀ     [+ dXA A] [+ residual]
    the same with one copy:   Wf = s C                    dy @ W ≈ ((dy · sᵀ)^ @ C [+ dXA (A H)]) H

With 4 bits stored (`Int8FourBitWeight`) the codes of either direction are made for each product, by one kernel out of
half a byte a weight; only the scales are kept.

What is in brackets is added where the product is scaled and written, in one launch (`Weight.fuses`). Weights of a group
share the scales of Wb, so that dY of all of them, side by side, is quantised once and multiplied at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor

from pronghorn.kernels.four_bit_int8 import four_bit_to_int8
from pronghorn.kernels.fp8 import E4M3, transpose_codes
from pronghorn.kernels.int8 import Codes, dequantise, product, rotate, rotation_of
from pronghorn.kernels.lora import LowRank
from pronghorn.weights.adjacent import side_by_side
from pronghorn.weights.base import Weight
from pronghorn.weights.operand import Operand, as_operand, rows_of
from pronghorn.weights.quantised import FourBitWeight

W = TypeVar("W", bound=Weight)


class Int8Products(Weight):
    """The products of weights that give their codes; see the module's docstring."""

    label = "quantised"
    adds_forward = adds_input_grad = False
    fuses = True
    #: fp32 [out, 1] of Wf
    scales: Tensor
    #: whether the input gradient has codes of its own, so that dY is turned for it
    turns_output_grads: bool

    def codes_forward(self) -> Codes:
        """Wf: codes [out, in] and scales [out, 1]."""
        raise NotImplementedError

    def codes_input_grad(self) -> Codes:
        """Wb, codes [in, out] and scales [in, 1], where `turns_output_grads`."""
        raise NotImplementedError

    def operand_of(self, dys: Sequence[Tensor]) -> Operand:
        """The operand of the input gradient of a stack: dY_i [T, out_i] of its parts, quantised side by side."""
        return Operand.joined_int8(dys, None if self.turns_output_grads else self.scales)

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
            self.codes_forward(),
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
        if self.turns_output_grads:
            return product(
                operand.int8(), self.codes_input_grad(), low_rank=low_rank, residual=residual, dtype=dtype
            )
        # A byte is a byte: the kernel that turns e4m3 round turns these.
        turned = transpose_codes(self.codes_forward()[0].view(E4M3)).view(torch.int8)
        ones = torch.ones(turned.shape[0], 1, device=turned.device)
        if low_rank is not None:
            low_rank = low_rank._replace(b=rotate(low_rank.b.t().contiguous()).t())
        dx = product(operand.int8(self.scales), (turned, ones), low_rank=low_rank, dtype=dtype)
        dx = rotate(dx)
        return dx if residual is None else residual + dx


class Int8Weight(Int8Products):
    """Stored as int8.

    Args:
        codes: [out, in] of W H. scales: fp32 [out, 1].
        back: codes [in, out] (columns of a group's, rows may be strided) and scales [in, 1] of Wᵀ H for the input
            gradient, or None to transpose `codes` in every one.
    """

    def __init__(self, codes: Tensor, scales: Tensor, back: Codes | None = None) -> None:
        self.codes, self.scales, self.back = codes, scales, back
        self.shape = (codes.shape[0], codes.shape[1])
        self.storage = "int8" if back is None else "int8 two"
        self.turns_output_grads = back is not None

    def dense(self, dtype: torch.dtype) -> Tensor:
        return dequantise(self.codes, self.scales, dtype)

    def codes_forward(self) -> Codes:
        return self.codes, self.scales

    def codes_input_grad(self) -> Codes:
        assert self.back is not None
        return self.back


class Int8FourBitWeight(Int8Products):
    """Stored in 4 bits, one weight or a stack of them, expanded to int8 codes for each product.

    Args:
        parts: the 4-bit weights [out_i, in], one below the other.
        scales: fp32 [Σout, 1] of W H. back_scales: fp32 [in, 1] of Wᵀ H, W being the whole group's.
        block: size of H's blocks along the outputs, which divides every out_i.
        kept: the codes of either direction where they are held.
    """

    turns_output_grads = True

    def __init__(
        self,
        parts: Sequence[FourBitWeight],
        scales: Tensor,
        back_scales: Tensor,
        block: int,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.parts, self.scales, self.back_scales = tuple(parts), scales, back_scales
        self.block, self.kept = block, kept
        self.shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
        self.storage = f"{parts[0].storage} in int8 products"

    def dense(self, dtype: torch.dtype) -> Tensor:
        parts = [part.dense(dtype) for part in self.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def codes_forward(self) -> Codes:
        if self.kept is not None:
            return self.kept[0], self.scales
        out, width = self.shape
        codes = torch.empty(out, width, dtype=torch.int8, device=self.scales.device)
        sizes = [part.shape[0] for part in self.parts]
        for part, scales, into in zip(self.parts, self.scales.split(sizes), codes.split(sizes), strict=True):
            _write_codes(part, scales, into, input_grad=False, block=rotation_of(width))
        return codes, self.scales

    def codes_input_grad(self) -> Codes:
        if self.kept is not None:
            return self.kept[1], self.back_scales
        out, width = self.shape
        codes = torch.empty(width, out, dtype=torch.int8, device=self.scales.device)
        sizes = [part.shape[0] for part in self.parts]
        for part, into in zip(self.parts, codes.split(sizes, 1), strict=True):
            _write_codes(part, self.back_scales, into, input_grad=True, block=self.block)
        return codes, self.back_scales


def _write_codes(part: FourBitWeight, scales: Tensor, out: Tensor, *, input_grad: bool, block: int) -> None:
    """int8 codes of one 4-bit weight [out_i, in] into `out`, its rows of Wf or its columns of Wb."""
    four_bit_to_int8(part.bits, scales, input_grad=input_grad, block=block, out=out)


def stacked_int8(parts: Sequence[Weight]) -> Int8Products | None:
    """int8 weights that lie side by side (`int8_linear.Int8Linear.group`, `four_bit.add_int8_products`) as one
    [Σout, in]; else None."""
    if _all(parts, Int8Weight):
        return _stacked_codes(parts)
    return _stacked_four_bit(parts) if _all(parts, Int8FourBitWeight) else None


def _all(parts: Sequence[Weight], kind: type[W]) -> TypeGuard[Sequence[W]]:
    return all(type(part) is kind for part in parts)


def _stacked_codes(parts: Sequence[Int8Weight]) -> Int8Weight | None:
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


def _stacked_four_bit(parts: Sequence[Int8FourBitWeight]) -> Int8FourBitWeight | None:
    scales, shared = side_by_side([part.scales for part in parts], 0), parts[0].back_scales
    if scales is None or any(part.back_scales.data_ptr() != shared.data_ptr() for part in parts):
        return None
    held = [part.kept for part in parts if part.kept is not None]
    kept = None
    if held:
        codes = side_by_side([forward for forward, _ in held], 0)
        back = side_by_side([back for _, back in held], 1)
        if len(held) < len(parts) or codes is None or back is None:
            return None
        kept = codes, back
    return Int8FourBitWeight([p for part in parts for p in part.parts], scales, shared, parts[0].block, kept)
