"""The left factor of a product with stored weights, in every form that some storage multiplies it in."""

from __future__ import annotations

from torch import Tensor


class Operand:
    """x [T, in] of products x @ Wᵀ (or dy [T, out] of dy @ W), shared by the weights of one group.

    A storage that multiplies in another format asks for it here, so that it is made once for all weights that share
    the operand, or was made by the kernel that produced it.

    Args:
        tensor: the rows in the computing dtype.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
