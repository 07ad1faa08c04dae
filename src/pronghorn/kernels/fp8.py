"""8-bit floating point (e4m3: Micikevicius et al. 2022, arXiv 2209.05433): numbers as codes with a scale each row.

    x_ti · c_i ≈ code_ti · scale_t,   scale_t = 2^⌈log₂(max_i |x_ti · c_i| / 448)⌉,   code = round_e4m3(x · c / scale)

e4m3 keeps 3 bits after the point: a number is off by at most 1/16 of itself, or, where it is smaller than 2⁻⁶ scales,
by at most 2⁻¹⁰ scales. The column factors c (1 where none are given) carry the row scales s of a weight into its
input gradient: dy @ (s ⊙ codes) = (dy · s) @ codes, so that one set of codes serves both directions.

Scales of rows are powers of two. A float format loses nothing by that but a binade of its smallest numbers. Of a
weight, code · scale is a bf16 number: what its products multiply, what `dequantise` gives and what a merged checkpoint
holds are the same values. And x · c / scale is exact, so whichever kernel makes the codes, they agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, use_triton
from pronghorn.kernels.glu import glu_forward
from pronghorn.kernels.nf4 import FourBits, dequantize_4bit

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# The scale of a row of zeros; small enough for every bf16 row, large enough for its reciprocal to be finite.
TINY = 2.0**-100
# The matrix units take inner and outer sizes in whole groups of 16 bytes.
MULTIPLE = 16

#: codes e4m3 [T, W] and what they are multiplied with: fp32 [T, 1], or [1, 1] for all rows
Fp8Rows = tuple[Tensor, Tensor]


def quantise_rows(
    x: Tensor, columns: Tensor | None = None, *, row_max: Tensor | None = None, impl: Impl | None = None
) -> Fp8Rows:
    """Codes e4m3 [T, W] and scales fp32 [T, 1] of x · columns.

    Args:
        x: [T, W], rows may be strided. columns: fp32, W elements, or int8 e for c = 2^e, or None.
        row_max: fp32 [T], max_i |x_ti · c_i|, where the kernel that made x has found it; nothing waits for whole rows
            then.
    """
    return quantise_joined((x,), columns, row_max=row_max, impl=impl)


def quantise_joined(
    parts: Sequence[Tensor],
    columns: Tensor | None = None,
    *,
    row_max: Tensor | None = None,
    impl: Impl | None = None,
) -> Fp8Rows:
    """`quantise_rows` of tensors [T, W_i] side by side, which are nowhere written so: codes [T, ΣW], scales [T, 1]."""
    if len(parts) > 3 and row_max is None:
        parts = (torch.cat([*parts], 1),)
    if use_triton(parts[0], impl):
        from pronghorn.kernels.triton.fp8 import quantise_joined as run

        return run(parts, columns, row_max)
    wide = _scaled(torch.cat([*parts], 1) if len(parts) > 1 else parts[0], columns)
    scales = row_scales(wide.abs().amax(1) if row_max is None else row_max)
    return (wide / scales).to(E4M3), scales


def row_scales(row_max: Tensor) -> Tensor:
    """Scales fp32 [T, 1] of rows whose largest numbers are `row_max` fp32 [T]: the least powers of two that bring them
    within 448."""
    # The exponent, one more where the mantissa is above 1.75: 448 is 1.75 · 2⁸.
    exponent = ((row_max.contiguous().view(torch.int32) + 0x1FFFFF) >> 23) - 8
    return (exponent.clamp_(min=27) << 23).view(torch.float32).view(-1, 1)


def exponents_of(scales: Tensor) -> Tensor:
    """int8 e with scales = 2^e, for power-of-two scales fp32."""
    return ((scales.contiguous().view(torch.int32) >> 23) - 127).to(torch.int8)


def glu_forward_fp8(
    gate: Tensor, up: Tensor, activation: str, *, impl: Impl | None = None
) -> tuple[Tensor, Fp8Rows]:
    """`kernels.glu.glu_forward`'s act [T, I], and its codes [T, I] with their scales [T, 1], in one pass.

    The codes are those of the rounded act: the same as `quantise_rows(act)`.
    """
    if use_triton(gate, impl):
        from pronghorn.kernels.triton.glu_fp8 import forward

        return forward(gate, up, activation)
    act = glu_forward(gate, up, activation, impl="torch")
    return act, quantise_rows(act, impl="torch")


def quantise_tensor(x: Tensor, *, impl: Impl | None = None) -> Fp8Rows:
    """Codes e4m3 [T, W] and one scale fp32 [1, 1] of x, for matrix units without row scales; rows may be strided."""
    if x.numel() == 0:
        return x.to(E4M3), torch.ones(1, 1, dtype=torch.float32, device=x.device)
    least, largest = torch.aminmax(x)
    scale = (torch.maximum(-least, largest).to(torch.float32) / E4M3_MAX).clamp_(min=TINY).view(1, 1)
    if use_triton(x, impl):
        from pronghorn.kernels.triton.fp8 import quantise_with

        return quantise_with(x, scale), scale
    return (x.to(torch.float32) / scale).to(E4M3), scale


def _scaled(x: Tensor, columns: Tensor | None) -> Tensor:
    wide = x.to(torch.float32)
    if columns is None:
        return wide
    columns = columns.view(-1)
    return torch.ldexp(wide, columns) if columns.dtype == torch.int8 else wide * columns


def quantise_weight(weight: Tensor, *, rowwise: bool = True) -> Fp8Rows:
    """Codes e4m3 [out, in] and power-of-two scales fp32 [out, 1] (or one, [1, 1]) of a weight."""
    largest = weight.abs().amax(1, keepdim=True).to(torch.float32)
    scales = power_of_two_scales(largest if rowwise else largest.amax().view(1, 1))
    return (weight.to(torch.float32) / scales).to(E4M3), scales


def power_of_two_scales(largest: Tensor) -> Tensor:
    """The least powers of two that bring numbers of these sizes within 448."""
    # frexp: largest / 448 = m · 2^e with m in [½, 1), so 2^e is above it and 2^(e-1) enough where m is ½.
    mantissa, exponent = torch.frexp((largest / E4M3_MAX).clamp(min=TINY))
    return torch.ldexp(torch.ones_like(largest), exponent - (mantissa == 0.5).to(exponent.dtype))


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes · scales [out, in] in `dtype`; exact in bf16 for a weight's scales."""
    # fp16 has too small a range for the scales by themselves.
    wide = torch.float32 if dtype == torch.float16 else dtype
    return torch.mul(codes.to(wide), scales.to(wide)).to(dtype)


def transpose_codes(codes: Tensor, *, impl: Impl | None = None) -> Tensor:
    """e4m3 [out, in] -> contiguous [in, out]."""
    if use_triton(codes, impl):
        from pronghorn.kernels.triton.fp8 import transpose

        return transpose(codes)
    return codes.t().contiguous()


def quantise_transposed(weight: Tensor, scales: Tensor, *, impl: Impl | None = None) -> Tensor:
    """e4m3 codes [in, out] of a 16-bit weight [out, in] for given scales fp32 [out, 1] or [1, 1], in one kernel.

    Numbers beyond 448 scales (a weight that has grown since they were made) become 448.
    """
    scales = scales.expand(weight.shape[0], 1).contiguous()
    if use_triton(weight, impl):
        from pronghorn.kernels.triton.fp8 import quantise_transposed as run

        return run(weight, scales)
    codes = (weight.to(torch.float32) / scales).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return codes.t().contiguous()


def product(
    rows: Fp8Rows,
    codes: Tensor,
    scales: Tensor | None,
    dtype: torch.dtype,
    *,
    fast: bool = True,
    emulate: bool = False,
) -> Tensor:
    """(rows' codes · scales) [T, K] @ (codes · scales)ᵀ [K, N] -> [T, N] in `dtype`.

    Args:
        codes: e4m3 [N, K], contiguous along K. scales: fp32 [N, 1], or None for ones; [1, 1] together with one scale
            for all rows.
        fast: let the matrix unit add up in fewer than fp32's bits (Hopper keeps about 14 of them).
        emulate: multiply the dequantised operands in fp32, as is always done on a CPU.
    """
    left, left_scales = rows
    if emulate or not left.is_cuda:
        right = codes.to(torch.float32)
        right = right if scales is None else right * scales
        return ((left.to(torch.float32) * left_scales) @ right.t()).to(dtype)
    if left.shape[0] == 0:
        return left.new_empty(0, codes.shape[0], dtype=dtype)
    by_row = scales is None or scales.numel() > 1
    right_scales = _ones(codes.shape[0], left.device) if scales is None else scales
    out = torch._scaled_mm(
        left,
        codes.t(),
        scale_a=left_scales,
        scale_b=right_scales.view(1, -1),
        # Row scales come with bf16 results only.
        out_dtype=dtype if dtype == torch.float16 and not by_row else torch.bfloat16,
        use_fast_accum=fast,
    )
    return out if out.dtype == dtype else out.to(dtype)


@lru_cache(maxsize=256)
def _ones(size: int, device: torch.device) -> Tensor:
    return torch.ones(1, size, dtype=torch.float32, device=device)


def four_bit_row_scales(bits: FourBits) -> Tensor | None:
    """Power-of-two scales fp32 [out, 1] of a 4-bit weight's rows; None where rows do not begin with a block.

    The largest number of a block is its scale (the code's ends are ±1), so the packed weight need not be read.
    """
    rows, width = bits.shape
    if width % bits.blocksize:
        return None
    largest = bits.block_scales().view(rows, -1).abs().amax(1, keepdim=True)
    return power_of_two_scales(largest.to(torch.float32))


def four_bit_to_fp8(
    bits: FourBits, scales: Tensor, *, transposed: bool = False, impl: Impl | None = None
) -> Tensor:
    """e4m3 codes of a 4-bit weight for given row scales fp32 [out, 1], in one kernel.

    Args:
        bits: whole blocks in a row.
        transposed: give [in, out] instead of [out, in].
    """
    if use_triton(bits.packed, impl):
        from pronghorn.kernels.triton.fp8 import from_four_bit

        return from_four_bit(bits, scales, transposed)
    codes = (dequantize_4bit(bits, torch.float32, impl="torch") / scales).to(E4M3)
    return codes.t().contiguous() if transposed else codes
