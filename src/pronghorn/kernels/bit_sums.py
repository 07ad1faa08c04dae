"""Numbers that are others once memory has been written to: sums over its 32-bit words, of all tensors in one launch.

    sum[p] = Σ_i mix(word[p, i] xor (i · 0x9E3779B1 mod 2³²)),   i = r · stride + c,   r < rows, c < 8

with mix the last step of MurmurHash3, so that changed signs or words that have changed places do not cancel. A piece p
is a part of one tensor: `rows` runs of eight words, which lie `stride` words apart; tensors that are read whole have a
stride of eight. Sums are integers of 64 bits: they do not depend on the order in which they are added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, use_triton

#: words that are read together, and the most such runs of a piece
RUN, ROWS = 8, 2048
_WORD = 0xFFFFFFFF


class Pieces:
    """Parts of tensors of one device, as they lie in memory now; the tensors are kept.

    Args:
        words: flat int32 views of the tensors (`words_of`). strides: words from one run to the next of each.
    """

    def __init__(self, words: Sequence[Tensor], strides: Sequence[int]) -> None:
        self.words = list(words)
        #: by piece: its tensor, its first word there, runs, stride
        self.plan = [
            (number, first * stride, min(ROWS, runs - first), stride)
            for number, (flat, stride) in enumerate(zip(words, strides, strict=True))
            for runs in [-(-flat.numel() // stride)]
            for first in range(0, runs, ROWS)
        ]
        #: int64 [P, 4] on the device: words from the first tensor's beginning to the piece's, runs, stride, words left
        self.table = torch.tensor(
            [
                [(words[n].data_ptr() - words[0].data_ptr()) // 4 + first, rows, stride, words[n].numel() - first]
                for n, first, rows, stride in self.plan
            ],
            dtype=torch.int64,
            device=words[0].device,
        )  # fmt: skip


def words_of(tensor: Tensor) -> Tensor | None:
    """The tensor's memory as flat int32; None where it is no whole number of such words side by side."""
    size = tensor.element_size()
    if not tensor.is_contiguous() or tensor.numel() * size % 4 or tensor.storage_offset() * size % 4:
        return None
    return tensor.detach().view(-1).view(torch.int32)


def bit_sums(pieces: Pieces, out: Tensor | None = None, *, impl: Impl | None = None) -> Tensor:
    """int64 [P]: the sum of each piece; written to `out` where it is given."""
    if out is None:
        out = torch.empty(len(pieces.plan), dtype=torch.int64, device=pieces.table.device)
    if use_triton(pieces.table, impl):
        from pronghorn.kernels.triton.bit_sums import bit_sums as by_triton

        by_triton(pieces.words[0], pieces.table, out, RUN)
        return out
    for at, (number, first, rows, stride) in enumerate(pieces.plan):
        flat = pieces.words[number]
        places = torch.arange(rows, device=flat.device)[:, None] * stride
        places = (places + torch.arange(RUN, device=flat.device)).view(-1)
        places = places[places < flat.numel() - first]
        out[at] = _mixed((flat[first + places].long() ^ places * 0x9E3779B1) & _WORD).sum()
    return out


def _mixed(words: Tensor) -> Tensor:
    """MurmurHash3's last step of 32-bit words held in int64."""
    words = words ^ (words >> 16)
    words = words * 0x85EBCA6B & _WORD
    words = words ^ (words >> 13)
    words = words * 0xC2B2AE35 & _WORD
    return words ^ (words >> 16)
