"""The left factor of a product with stored weights, in every form that some storage multiplies it in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from pronghorn.kernels import int8 as integers
from pronghorn.kernels.fp8 import Fp8Rows, quantise_joined, quantise_rows, quantise_tensor
from pronghorn.weights.adjacent import side_by_side

#: in the place of column factors: codes are int8 of rows turned by H (`kernels.int8`)
Turned = Literal["turned"]
TURNED: Turned = "turned"


class Operand:
    """x [T, in] of products x @ Wᵀ (or dy [T, out] of dy @ W), shared by the weights of one group.

    A storage that multiplies in another format asks for it here, so that it is made once for all weights that share
    the operand, or was made by the kernel that produced it.

    Args:
        tensor: the rows in the computing dtype.
        fp8: what `fp8()` shall give, where the kernel that produced `tensor` has made it already.
        columns: the column factors that `fp8` or `row_max` was made with, those of the one weight it is for.
        row_max: fp32 [T], the largest of each row of |tensor · columns|, where the kernel before has found it.
        int8: what `int8()` shall give, where the kernel that produced `tensor` has made it already.
    """

    def __init__(
        self,
        tensor: Tensor,
        fp8: Fp8Rows | None = None,
        columns: Tensor | None = None,
        row_max: Tensor | None = None,
        int8: integers.Codes | None = None,
    ) -> None:
        self.tensor = tensor
        self._int8, self._int8_for = int8, _identity(None)
        self._fp8, self._row_max = fp8, row_max
        self._made_for: tuple[int | None, bool] = (_identity(columns), True)

    @staticmethod
    def joined(parts: Sequence[Tensor], columns: Tensor, row_max: Tensor | None = None) -> Operand:
        """The operand of a stack's input gradient (`stack.stacked`): dY_i [T, out_i] side by side, in fp8 only."""
        whole = side_by_side(parts, 1)
        return Operand(
            parts[0], quantise_joined(parts if whole is None else (whole,), columns, row_max=row_max), columns
        )

    @staticmethod
    def joined_int8(parts: Sequence[Tensor], columns: Tensor | None) -> Operand:
        """The operand of a stack's input gradient: dY_i [T, out_i] side by side, in int8 only; see `int8`."""
        whole = side_by_side(parts, 1)
        given = parts if whole is None else (whole,)
        operand = Operand(parts[0], int8=integers.quantise_joined(given, columns, rotated=columns is None))
        operand._int8_for = _identity(columns)
        return operand

    @property
    def made(self) -> Fp8Rows | None:
        """The codes and scales that are there already, whatever their format."""
        return self._int8 if self._fp8 is None else self._fp8

    @staticmethod
    def with_codes(tensor: Tensor, codes: Tensor | None, scales: Tensor | None) -> Operand:
        """The operand that `made` these codes and scales."""
        if codes is None or scales is None:
            return Operand(tensor)
        rows = codes, scales
        return Operand(tensor, int8=rows) if codes.dtype == torch.int8 else Operand(tensor, rows)

    def release(self) -> None:
        """Let go of the codes: no product takes them any more."""
        self._fp8 = self._row_max = self._int8 = None

    def fp8(self, columns: Tensor | None = None, *, rowwise: bool = True) -> Fp8Rows:
        """The rows as e4m3 codes [T, in] and scales fp32 [T, 1]: tensor · columns ≈ codes · scales.

        Args:
            columns: factors fp32 [in, 1] of the columns, the row scales of the weight in an input gradient; or their
                exponents int8 [in].
            rowwise: False gives one scale [1, 1] for all rows, and knows no column factors.
        """
        wanted = (_identity(columns), rowwise)
        if self._fp8 is None or self._made_for != wanted:
            known = self._row_max if self._made_for == wanted else None
            self._fp8 = (
                quantise_rows(self.tensor, columns, row_max=known)
                if rowwise
                else quantise_tensor(self.tensor)
            )
            self._made_for, self._row_max = wanted, None
        return self._fp8

    def int8(self, columns: Tensor | None = None) -> integers.Codes:
        """The rows as int8 codes [T, in] and scales fp32 [T, 1]: tensor · H ≈ codes · scales, or tensor · columns.

        Args:
            columns: factors fp32 [in, 1] of the columns, in place of the turn by H.
        """
        wanted = _identity(columns)
        if self._int8 is None or self._int8_for != wanted:
            self._int8 = integers.quantise_rows(self.tensor, columns, rotated=columns is None)
            self._int8_for = wanted
        return self._int8


def _identity(columns: Tensor | None) -> int | None:
    """Factors are the same when they lie at the same place: those of a weight live as long as it does."""
    return None if columns is None else columns.data_ptr()


def as_operand(x: Tensor | Operand) -> Operand:
    """x itself, or an operand that nobody shares."""
    return x if isinstance(x, Operand) else Operand(x)


def rows_of(x: Tensor | Operand) -> Tensor:
    """The rows in the computing dtype."""
    return x.tensor if isinstance(x, Operand) else x
