"""q, k and v of tall matrices in 16 bits by one launch: the product, what adapters add, and the rotation.

    [q k v] = x Wᵀ + [XA_q B_qᵀ  XA_k B_kᵀ  XA_v B_vᵀ],   q = R q,  k = R k

R is the rotation of `kernels.rope` by halves. Sums and rotation in fp32, rounded once. On Hopper's matrix units
(`triton/heads_hopper.py`); the formulas in torch are the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pronghorn.kernels import products, tiles
from pronghorn.kernels.dispatch import Impl, math_dtype
from pronghorn.kernels.rope import rotate

#: head size that half a tile's columns hold
HEAD = tiles.COLUMNS // 2


@dataclass(frozen=True)
class Heads:
    """x [T, in]; weight [N·D + 2·K·D, in]; widths N·D, K·D, K·D; xa [T, 3·R], scaled; bs [N·D, R], [K·D, R] twice; cos,
    sin [T, D]."""

    x: Tensor
    weight: Tensor
    widths: tuple[int, int, int]
    xa: Tensor
    bs: tuple[Tensor, Tensor, Tensor]
    cos: Tensor
    sin: Tensor

    @property
    def rank(self) -> int:
        return self.bs[0].shape[1]


def why_not(call: Heads) -> str | None:
    """Why the kernel does not take these, or not well; None: it does."""
    if call.cos.shape[1] != HEAD or any(width % tiles.COLUMNS for width in call.widths):
        return f"heads of {call.cos.shape[1]} that turn as a whole, of which the kernel takes {HEAD}"
    if len({b.shape[1] for b in call.bs}) > 1 or call.rank % 8:
        return "adapters of different ranks, or of one that is no multiple of 8"
    if call.cos.stride() != call.sin.stride() or call.cos.stride(1) != 1:
        return "angles that do not lie row by row"
    return products.why_not(call.x, call.weight, True, call.rank, call.xa, *call.bs)


def rotated_heads(call: Heads, *, impl: Impl | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, N·D], k and v [T, K·D]."""
    if tiles.on_hopper(call.x, impl):
        from pronghorn.kernels.triton.heads_hopper import run

        return run(call)
    dtype = math_dtype(call.x.dtype)
    wide = call.x.to(dtype) @ call.weight.to(dtype).t()
    parts = wide.split(call.widths, 1)
    shares = call.xa.to(dtype).split(call.rank, 1)
    made = []
    for index, (part, share, b) in enumerate(zip(parts, shares, call.bs, strict=True)):
        y = torch.addmm(part, share, b.to(dtype).t())
        if index < 2:
            y = rotate(y.view(y.shape[0], -1, call.cos.shape[1]), call.cos, call.sin).flatten(1)
        made.append(y.to(call.x.dtype))
    return made[0], made[1], made[2]
