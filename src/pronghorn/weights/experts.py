"""The stacked weights of a layer's experts in whatever form they are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ExpertWeight:
    """One projection of all experts: W [E, out, in], or [E, in, out] where `transposed`."""

    #: experts, out, in
    shape: tuple[int, int, int]
    transposed: bool = False
    #: the tensor that receives dW, or None for frozen weights
    parameter: Tensor | None = None
    #: as `Weight.storage` and `Weight.label`
    storage: str = "dense"
    label: str = "exact"

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The stack in `dtype`. May alias the stored tensor: never write to it."""
        raise NotImplementedError


class DenseExperts(ExpertWeight):
    """Experts stored as they are used: bf16, fp16, fp32 or fp64."""

    def __init__(self, weight: Tensor, transposed: bool) -> None:
        self.weight, self.transposed = weight, transposed
        experts, rows, columns = weight.shape
        self.shape = (experts, columns, rows) if transposed else (experts, rows, columns)
        self.parameter = weight if weight.requires_grad else None
        self.storage = str(weight.dtype).removeprefix("torch.")

    def dense(self, dtype: torch.dtype) -> Tensor:
        weight = self.weight.detach()
        return weight if weight.dtype == dtype else weight.to(dtype)


def read_experts(module: Any, name: str, transposed: bool) -> ExpertWeight:
    """The stack `name` of a module of experts."""
    return DenseExperts(getattr(module, name), transposed)
