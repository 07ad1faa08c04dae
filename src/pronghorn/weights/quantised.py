"""Frozen weights in bitsandbytes' 4-bit (NF4, FP4) and 8-bit layouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pronghorn.kernels.nf4 import FourBits, dequantize_4bit
from pronghorn.weights.base import Weight


class FourBitWeight(Weight):
    """NF4 or FP4 codes, two a byte, with one absmax a block (itself 8-bit under double quantisation).

    Args:
        packed: uint8 codes, bitsandbytes' order (first value in the high nibble).
        state: bitsandbytes' `QuantState` of the weight.
        kept: the dequantised weight [out, in], where there is room for it.
    """

    label = "quantised"

    def __init__(self, packed: Tensor, state: Any, kept: Tensor | None = None) -> None:
        self.kept = kept
        self.packed = packed if packed.dtype == torch.uint8 else packed.view(torch.uint8)
        self.state = state
        self.shape = (state.shape[0], state.shape[1])
        self.storage = f"{state.quant_type}{' double' if state.nested else ''}"

    @property
    def bits(self) -> FourBits:
        """As `kernels.nf4` takes it."""
        state, nested = self.state, None
        if state.nested:
            nested = state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize
        return FourBits(self.packed, state.absmax, state.code, state.blocksize, self.shape, nested)

    @property
    def stored_bytes(self) -> tuple[int, ...]:
        """Bytes of each tensor that holds it, but for what is `kept` besides."""
        state = self.state
        held = [self.packed, state.absmax, state.code]
        if state.nested:
            held += [state.state2.absmax, state.state2.code, state.offset]
        return tuple(tensor.nbytes for tensor in held)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return dequantize_4bit(self.bits, dtype) if self.kept is None else self.kept.to(dtype)

    def ready(self, dtype: torch.dtype) -> Tensor | None:
        return self.kept if self.kept is not None and self.kept.dtype == dtype else None


class BitsAndBytesInt8Weight(Weight):
    """bitsandbytes' row-wise int8: W = codes * (absmax / 127) per output row.

    The product runs in 16 bits on the dequantised weight. Stock LLM.int8() also quantises the activations; this
    storage does not, so it is closer to the unquantised model.
    """

    storage = "bitsandbytes int8"
    label = "quantised"

    def __init__(self, codes: Tensor, row_absmax: Tensor) -> None:
        self.codes, self.row_absmax = codes, row_absmax
        self.shape = (codes.shape[0], codes.shape[1])

    def dense(self, dtype: torch.dtype) -> Tensor:
        scale = (self.row_absmax.to(torch.float32) / 127.0).unsqueeze(1)
        return torch.mul(self.codes.to(torch.float32), scale).to(dtype)
