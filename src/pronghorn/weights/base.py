"""The interface of a stored weight W [out, in], and the plain one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pronghorn.kernels.lora import LowRank
from pronghorn.weights.operand import Operand, rows_of


class Weight:
    """A linear layer's weight W [out, in] in whatever form it is stored.

    Subclasses give `dense`; the products below are what the blocks call, so that a storage with its own matrix
    product (FP8) can replace them one by one. Left factors come as tensors, or as an `Operand` where several weights
    share one.
    """

    shape: tuple[int, int]
    #: the tensor that receives dW, or None for a frozen weight
    parameter: Tensor | None = None
    #: how the weight is stored, for `describe()`
    storage: str = "dense"
    #: "exact" where products differ from the 16- or 32-bit ones by reordering alone, "quantised" otherwise
    label: str = "exact"
    #: whether `matmul_add_` and `matmul_t_add_` add inside the product, without a second pass over the result
    adds_forward: bool = True
    adds_input_grad: bool = True
    #: whether `matmul_fused` and `matmul_t_fused` exist, which add an adapter's share along with all else
    fuses: bool = False

    @property
    def quantises_rows(self) -> bool:
        """Whether products take their operand's rows in fp8 (see `Operand`), which the kernel before may make."""
        return False

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] in `dtype`. May alias the stored tensor: never write to it."""
        raise NotImplementedError

    def ready(self, dtype: torch.dtype) -> Tensor | None:
        """W [out, in] where it lies ready in `dtype`, for kernels that read it there; None where it has to be made."""
        return None

    def matmul(self, x: Tensor | Operand, bias: Tensor | None = None) -> Tensor:
        """x [T, in] @ Wᵀ (+ bias) -> [T, out] in x's dtype."""
        x = rows_of(x)
        return F.linear(x, self.dense(x.dtype), bias)

    def matmul_add_(self, out: Tensor, x: Tensor | Operand) -> Tensor:
        """out [T, out] += x [T, in] @ Wᵀ, in place; one rounding where the dtypes agree."""
        x = rows_of(x)
        if out.dtype == x.dtype:
            return out.addmm_(x, self.dense(x.dtype).t())
        return out.add_(self.matmul(x))

    def matmul_t(self, dy: Tensor | Operand) -> Tensor:
        """dy [T, out] @ W -> [T, in] in dy's dtype."""
        dy = rows_of(dy)
        return dy @ self.dense(dy.dtype)

    def matmul_t_add_(self, out: Tensor, dy: Tensor | Operand) -> Tensor:
        """out [T, in] += dy [T, out] @ W, in place."""
        dy = rows_of(dy)
        return out.addmm_(dy, self.dense(dy.dtype))

    def matmul_fused(
        self,
        x: Tensor | Operand,
        low_rank: LowRank | None = None,
        residual: Tensor | None = None,
        bias: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x [T, in] @ Wᵀ + low_rank + residual (+ bias) -> [T, out] in x's dtype, without a pass of its own for either;
        `low_rank` and `residual` [T, out] have that dtype, too. `out`: what is written, maybe the residual."""
        raise NotImplementedError

    def matmul_t_fused(
        self, dy: Tensor | Operand, low_rank: LowRank | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """dy [T, out] @ W + low_rank + residual -> [T, in] in dy's dtype; `low_rank.b` is Aᵀ [in, R]."""
        raise NotImplementedError


class DenseWeight(Weight):
    """A weight stored as it is used: bf16, fp16, fp32 or fp64."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.shape = (weight.shape[0], weight.shape[1])
        self.parameter = weight if weight.requires_grad else None
        self.storage = str(weight.dtype).removeprefix("torch.")

    def dense(self, dtype: torch.dtype) -> Tensor:
        weight = self.weight.detach()
        return weight if weight.dtype == dtype else weight.to(dtype)

    def ready(self, dtype: torch.dtype) -> Tensor | None:
        return self.weight.detach() if self.weight.dtype == dtype else None
