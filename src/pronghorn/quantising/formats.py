"""The forms a linear weight can have in a checkpoint that stock bitsandbytes reads, and what each takes.

A 4-bit checkpoint stores each tensor's own `QuantState` beside its codes, so that blocks and double quantisation may
differ from module to module; what is left in 16 bits is named in `llm_int8_skip_modules`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

#: scales that share a second scale under double quantisation, as bitsandbytes has it
SCALES_A_BLOCK = 256
#: fp32 tensors of a weight besides its codes and scales: the 16 values; with double quantisation also the table of 256
_CODE_BYTES, _NESTED_BYTES = 16 * 4, 256 * 4


@dataclass(frozen=True)
class Format:
    """NF4 with one scale for each `blocksize` consecutive weights, or the compute dtype where `blocksize` is 0.

    Args:
        double: scales are stored in 8 bits with an fp32 scale for 256 of them (double quantisation).
        element: bytes of an element of the compute dtype.
    """

    blocksize: int
    double: bool = True
    element: int = 2

    def __str__(self) -> str:
        if self.dense:
            return f"{8 * self.element} bit"
        return f"nf4-{self.blocksize}{'' if self.double else ' fp32 scales'}"

    @property
    def dense(self) -> bool:
        return self.blocksize == 0

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the tensors that hold a weight of this shape."""
        count = shape[0] * shape[1]
        if self.dense:
            return self.element * count
        blocks = -(-count // self.blocksize)
        if not self.double:
            return -(-count // 2) + blocks * 4 + _CODE_BYTES
        coarse = -(-blocks // SCALES_A_BLOCK)
        return -(-count // 2) + blocks + coarse * 4 + _CODE_BYTES + _NESTED_BYTES


def dense_form(dtype: torch.dtype) -> Format:
    """A module left as it is, in the compute dtype."""
    return Format(0, element=dtype.itemsize)


#: sizes of blocks that a module may have; 64 is what bitsandbytes and Transformers take by themselves
_PLAIN_BLOCK, _BLOCKS = 64, (128, 64, 32)


def plain_form(double: bool) -> Format:
    """What bitsandbytes and Transformers make of every module."""
    return Format(_PLAIN_BLOCK, double)


def forms_of(width: int, double: bool) -> list[Format]:
    """The forms with 4 bits that a module with `width` inputs may have: bitsandbytes' kernel for few rows wants whole
    blocks in a row, and its CPU kernel refuses others."""
    return [Format(size, double) for size in _BLOCKS if size == _PLAIN_BLOCK or width % size == 0]


@lru_cache(maxsize=4)
def nf4_values(device: torch.device) -> Tensor:
    """The 16 values of NF4 in ascending order, fp32."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device=device)  # type: ignore[no-any-return]


def nearest(scaled: Tensor) -> Tensor:
    """Indices (int64) of the NF4 values nearest to w / scale, the lower one at a tie."""
    values = nf4_values(scaled.device)
    boundaries = (values[1:] + values[:-1]) / 2
    if scaled.is_cuda or scaled.numel() < _MANY:
        return torch.bucketize(scaled, boundaries)
    # A CPU's search takes 28 ns an element, for branches that it cannot foresee; 15 comparisons take 12.
    found = torch.zeros(scaled.shape, dtype=torch.uint8)
    for boundary in boundaries.tolist():
        found += scaled > boundary
    return found.long()


#: elements from which on the calls of 15 comparisons do not matter
_MANY = 1 << 15


def spread(scales: Tensor, shape: tuple[int, int], blocksize: int) -> Tensor:
    """Scales [blocks] as one per weight [out, in]. Blocks run through the rows, and may cross from one to the next."""
    return scales.repeat_interleave(blocksize)[: shape[0] * shape[1]].view(shape)


@dataclass(frozen=True)
class Scales:
    """What a weight's scales are stored as, and the values that they stand for.

    Args:
        values: fp32 [blocks], as dequantisation gives them.
        stored: fp32 [blocks], or uint8 codes of them with `nested`, bitsandbytes' (offset, second `QuantState`).
    """

    values: Tensor
    stored: Tensor
    nested: tuple[Tensor, Any] | None = None


def store_scales(wanted: Tensor, form: Format) -> Scales:
    """Scales [blocks] fp32 as a format stores them."""
    if not form.double:
        return Scales(wanted, wanted)
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    offset = wanted.mean()
    codes, state = quantize_blockwise(wanted - offset, blocksize=SCALES_A_BLOCK)
    return Scales(dequantize_blockwise(codes, state) + offset, codes, (offset, state))


@dataclass(frozen=True)
class Stored:
    """A weight in 4 bits.

    Args:
        indices: of NF4 values, uint8 [out, in].
    """

    indices: Tensor
    scales: Scales
    form: Format

    def dense(self) -> Tensor:
        """The weight that it stands for, fp32 [out, in]."""
        shape = (self.indices.shape[0], self.indices.shape[1])
        spread_scales = spread(self.scales.values, shape, self.form.blocksize)
        return nf4_values(self.indices.device)[self.indices.long()].mul_(spread_scales)

    def pack(self, dtype: torch.dtype) -> tuple[Tensor, Any]:
        """(codes uint8 [⌈out · in / 2⌉, 1], `QuantState`) as bitsandbytes holds them; `dtype` is what it dequantises
        to."""
        from bitsandbytes.functional import QuantState

        flat = self.indices.reshape(-1)
        if flat.numel() % 2:
            flat = torch.nn.functional.pad(flat, (0, 1))
        packed = (flat[::2] << 4 | flat[1::2]).unsqueeze(1)
        offset, second = self.scales.nested or (None, None)
        state = QuantState(
            absmax=self.scales.stored,
            shape=torch.Size(self.indices.shape),
            code=nf4_values(self.indices.device).clone(),  # saving refuses tensors that modules share
            blocksize=self.form.blocksize,
            quant_type="nf4",
            dtype=dtype,
            offset=offset,
            state2=second,
        )
        return packed, state
