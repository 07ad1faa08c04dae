"""Tiles of products of tall matrices in 16 bits on Hopper: what their kernels take, and when tiles fill the GPU."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from pronghorn.kernels.dispatch import Impl, use_triton

#: rows of a tile by two groups of warps, and its columns
ROWS, COLUMNS = 128, 256
#: processors of a Hopper GPU, and which share of them must have a tile at all times: at 1.5B with tiles of 512 rows,
#: where it is 0.71 and 0.53, a step takes 6 % longer than with products that cut their tiles to size
PROCESSORS, LEAST_BUSY = 132, 0.8


#: What a product by tiles of 192 rows costs of one by tiles of 128: fewer bytes travel from the second cache, and a
#: card at the limit of its power clocks higher (gate and up of 8B for seconds: 2,842 against 2,908 µs).
TALL = 0.977


def groups_of(rows: int, width: int, columns: int) -> int:
    """Groups of 64 rows in a tile of so many columns, two or three, where a kernel has both: three unless the last
    round of tiles, which may leave processors idle, costs more than they save."""

    def rounds(groups: int) -> int:
        tiles = -(-rows // (64 * groups)) * -(-width // columns)
        return groups * -(-tiles // PROCESSORS)

    return 3 if TALL * rounds(3) < rounds(2) else 2


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


class Sums(NamedTuple):
    """How many partial sums there are: of the rows (columns) before `until` and of the `rest`."""

    first: int
    rest: int
    until: int

    @property
    def most(self) -> int:
        return max(self.first, self.rest)

    def times(self, count: int) -> Sums:
        """Where as many write theirs for each."""
        return Sums(count * self.first, count * self.rest, self.until)


class Order(NamedTuple):
    """How programs go through rows of tiles where each should stay in a row, to keep a sum over its tiles there.

    `together` rows at a time are gone through column by column, by all `programs`; where these are a multiple of the
    rows, `period` times, each stays in its row (0: they are not). The rows that are left over are for `rest` programs.
    """

    programs: int
    period: int
    rest: int
    together: int

    def sums(self, rows: int, across: int, size: int) -> Sums:
        """Partial sums of [rows, across] tiles, where a row of them is of `size` rows of the matrix."""
        left = rows % self.together
        stays = left > 0 and self.rest % left == 0
        first = min(self.period or across, across) if rows >= self.together else 0
        rest = min(self.rest // left, across) if stays else across * (left > 0)
        return Sums(first, rest, (rows - left) * size)


@cache
def order_of(rows: int, across: int, most: int, together: int) -> Order:
    """For [rows, across] tiles and `most` programs."""
    count = min(rows * across, most)
    left = rows % together
    whole, rest = (rows - left) * across, count
    # Fewer programs than there are let each stay in its row there, too, unless that takes one more round.
    if left and count >= left and whole >= count:
        kept = count // left * left
        if _rounds(whole, left * across, count, kept) <= _rounds(whole, left * across, count, count):
            rest = kept
    return Order(count, 0 if count % together else count // together, rest, together)


def _rounds(whole: int, left: int, programs: int, rest: int) -> int:
    """Most tiles of a program: those that have one more of the `whole` come last among those that take what is left."""
    late = programs - whole % programs
    return max(
        whole // programs + (turn >= late) + (-(-max(left - turn, 0) // rest) if turn < rest else 0)
        for turn in range(programs)
    )
