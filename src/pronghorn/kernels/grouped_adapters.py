"""B of adapters on stacked experts between PEFT's order and the one that grouped products read.

PEFT keeps B as [out, R · E], the columns of a rank together (element [o, r · E + e] is expert e's); products read
[E, out, R], an expert's matrix in one piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, use_triton


def stack_b(
    b: Tensor, experts: int, scaling: float, dtype: torch.dtype, *, impl: Impl | None = None
) -> Tensor:
    """scaling · B [E, out, R] in `dtype`, of b [out, R · E]."""
    out, rank = b.shape[0], b.shape[1] // experts
    stacked = torch.empty(experts, out, rank, dtype=dtype, device=b.device)
    if use_triton(b, impl):
        from pronghorn.kernels.triton.grouped_adapters import stack

        return stack(b, scaling, stacked)
    return torch.mul(b.view(out, rank, experts).permute(2, 0, 1), scaling, out=stacked)


def unstack_b(stacked: Tensor, scaling: float, *, impl: Impl | None = None) -> Tensor:
    """scaling · [E, out, R], as [out, R · E] in the same dtype."""
    experts, out, rank = stacked.shape
    b = torch.empty(out, rank, experts, dtype=stacked.dtype, device=stacked.device)
    if use_triton(stacked, impl):
        from pronghorn.kernels.triton.grouped_adapters import unstack

        return unstack(stacked, scaling, b).view(out, rank * experts)
    return torch.mul(stacked.permute(1, 2, 0), scaling, out=b).view(out, rank * experts)
