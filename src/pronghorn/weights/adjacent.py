"""Views that follow each other in one storage, seen as the one tensor that they are parts of; who holds a storage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


def side_by_side(tensors: Sequence[Tensor], dim: int) -> Tensor | None:
    """Views that follow each other in one storage along a dimension, as one view; else None."""
    first = tensors[0]
    storage, end = first.untyped_storage()._cdata, first.storage_offset()
    for tensor in tensors:
        apart = tensor.untyped_storage()._cdata != storage or tensor.storage_offset() != end
        if apart or tensor.stride() != first.stride() or tensor.dtype != first.dtype:
            return None
        end += tensor.shape[dim] * tensor.stride(dim)
    shape = list(first.shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    # Parts of another matrix that follow by chance: columns may not run on into the next row.
    if dim == 1 and shape[1] * first.stride(1) > first.stride(0) and shape[0] > 1:
        return None
    return first.as_strided(shape, first.stride(), first.storage_offset())


def held_by(storage: torch.UntypedStorage, tensors: int) -> bool:
    """Whether so many tensors hold a storage, and nobody else; False where this torch does not tell."""
    here = _references_here()
    return here >= 0 and _references(storage) == tensors + here


def _references(storage: torch.UntypedStorage) -> int:
    """How many tensors and others hold a storage; 0 where this torch does not tell."""
    count: Any = getattr(torch._C, "_storage_Use_Count", None)
    return 0 if count is None else int(count(storage._cdata))


@cache
def _references_here() -> int:
    """What `_references` counts besides tensors, in this torch: of a tensor that nobody else has; negative where it
    does not tell."""
    own = torch.empty(1)
    return _references(own.untyped_storage()) - 1
