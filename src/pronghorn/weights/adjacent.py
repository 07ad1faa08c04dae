"""Views that follow each other in one storage, seen as the one tensor that they are parts of."""

from __future__ import annotations

from collections.abc import Sequence

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
