"""Tiles of products of tall matrices in 16 bits on Hopper: what their kernels take, and when tiles fill the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, use_triton

#: rows of a tile by two groups of warps, and its columns
ROWS, COLUMNS = 128, 256
#: processors of a Hopper GPU, and which share of them must have a tile at all times: at 1.5B with tiles of 512 rows,
#: where it is 0.71 and 0.53, a step takes 6 % longer than with products that cut their tiles to size
PROCESSORS, LEAST_BUSY = 132, 0.8


def fills(rows: int, width: int, columns: int) -> bool:
    """Whether tiles of so many columns leave few processors idle."""
    tiles = -(-rows // ROWS) * -(-width // columns)
    return tiles > 0 and tiles >= LEAST_BUSY * PROCESSORS * -(-tiles // PROCESSORS)


def padded(rank: int) -> int:
    """What the matrix units take of an adapter."""
    return max(16, 1 << (rank - 1).bit_length()) if rank else 0


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a GPU does not run these kernels on numbers of a dtype; None: it does."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels multiply 16-bit numbers, not {dtype}"
    if device.type != "cuda":
        return f"the kernels run on Hopper GPUs, not on a {device.type}"
    from pronghorn.kernels.triton.gemm8 import why_not_hopper

    return why_not_hopper(device.index or 0)


def on_hopper(x: Tensor, wish: Impl | None) -> bool:
    """Whether the kernels run, not the formulas: by wish, or where a GPU has them."""
    return use_triton(x, wish) and (wish is not None or why_not(x.device, x.dtype) is None)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether rows begin at multiples of 16 bytes and are contiguous, as the copy engine wants them."""
    return all(
        x is None
        or (
            x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
        )
        for x in tensors
    )  # fmt: skip
