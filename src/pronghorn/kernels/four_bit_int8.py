"""4-bit weights to the int8 codes that products multiply (`kernels.int8`), in one kernel.

    forward:          codes [out, in] = rint(W H / s),    s [out, 1], H along in
    input gradient:   codes [in, out] = rint(Wᵀ H / s),   s [in, 1],  H along out

W is what the 4 bits stand for (`kernels.nf4`). Scales are made once, where the weight is loaded, so that nothing has to
be read twice: half a byte comes in for a weight and one goes out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, multiplies_in_triton
from pronghorn.kernels.int8 import LARGEST, rotation_of, turned
from pronghorn.kernels.nf4 import FourBits, dequantize_4bit


def four_bit_to_int8(
    bits: FourBits,
    scales: Tensor,
    *,
    input_grad: bool = False,
    block: int | None = None,
    out: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """int8 codes of a 4-bit weight [out, in] for given scales, of one direction.

    Args:
        scales: fp32 [out, 1], with `input_grad` [in, 1].
        block: the size of H's blocks, `rotation_of` the axis that is turned unless the weight is a part of a wider one.
        out: written and returned where given, unit stride along the last axis.

    Raises:
        ValueError: where blocks of that size do not divide the axis.
    """
    rows, width = bits.shape
    along = rows if input_grad else width
    block = rotation_of(along) if block is None else block
    if not block or along % block or not rotation_of(width):
        raise ValueError(f"a weight of {rows} x {width} cannot be cut into blocks of {block}")
    if out is None:
        size = (width, rows) if input_grad else (rows, width)
        out = torch.empty(size, dtype=torch.int8, device=bits.packed.device)
    if multiplies_in_triton(bits.packed, impl):
        from pronghorn.kernels.triton.four_bit_int8 import from_four_bit

        return from_four_bit(bits, scales, input_grad, block, out)
    dense = dequantize_4bit(bits, torch.float32, impl="torch")
    wide = turned(dense.t().contiguous() if input_grad else dense, block)
    return out.copy_(wide.div_(scales).round_().clamp_(-LARGEST, LARGEST))
