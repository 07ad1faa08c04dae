"""The left factor of a product with stored weights, in every form that some storage multiplies it in."""

from __future__ import annotations

from torch import Tensor

from pronghorn.kernels.fp8 import quantise_rows

#: codes e4m3 [T, in] and the scales that belong to them: fp32 [T, 1]
Fp8Rows = tuple[Tensor, Tensor]


class Operand:
    """x [T, in] of products x @ Wᵀ (or dy [T, out] of dy @ W), shared by the weights of one group.

    A storage that multiplies in another format asks for it here, so that it is made once for all weights that share
    the operand, or was made by the kernel that produced it.

    Args:
        tensor: the rows in the computing dtype.
        fp8: what `fp8()` shall give, where the kernel that produced `tensor` has made it already.
    """

    def __init__(self, tensor: Tensor, fp8: Fp8Rows | None = None) -> None:
        self.tensor = tensor
        self._fp8 = fp8

    def fp8(self) -> Fp8Rows:
        """The rows as e4m3 codes [T, in] with a scale fp32 [T, 1] each: tensor ≈ codes · scales."""
        if self._fp8 is None:
            self._fp8 = quantise_rows(self.tensor)
        return self._fp8


def as_operand(x: Tensor | Operand) -> Operand:
    """x itself, or an operand that nobody shares."""
    return x if isinstance(x, Operand) else Operand(x)


def rows_of(x: Tensor | Operand) -> Tensor:
    """The rows in the computing dtype."""
    return x.tensor if isinstance(x, Operand) else x
