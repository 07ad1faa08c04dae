"""A norm's parameters as the blocks need them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pronghorn.blocks.projection import GradientSink
from pronghorn.kernels.int8 import rms_norm_backward_int8, rms_norm_forward_int8
from pronghorn.kernels.layer_norm import layer_norm, layer_norm_backward, layer_norm_forward
from pronghorn.kernels.rms_norm import (
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_fp8,
    rms_norm_forward,
    rms_norm_forward_fp8,
)
from pronghorn.weights import Operand
from pronghorn.weights.operand import TURNED, Turned


@dataclass(frozen=True)
class Norm:
    """y = x / rms(x) · (weight + offset); weight [H], `offset` is 1 for families that store w - 1.

    `centred`: the mean is taken off x first (LayerNorm, whose weights may be [G, H] that rows take in turn); it has no
    offset.
    """

    weight: Tensor
    eps: float
    offset: float = 0.0
    centred: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Differentiable, of rows [T, H]."""
        if self.centred:
            return layer_norm(x, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps, weight_offset=self.offset)

    def of_heads(self, x: Tensor) -> Tensor:
        """Heads [T, N, D] normalised each by itself, or all of a token at once, as the weight's size says."""
        return self.forward(self._rows(x), x.dtype)[0].tensor.view(x.shape)

    def of_heads_backward(self, dy: Tensor, x: Tensor, sink: GradientSink) -> Tensor:
        """The gradient of `of_heads`'s input; the weight's goes to the sink."""
        return self.backward(self._rows(dy), self._rows(x), None, sink).tensor.view(x.shape)

    def is_of_a_head(self, size: int) -> bool:
        """Whether this is an RMSNorm of heads of `size`, one weight for all."""
        return not self.centred and self.weight.shape == (size,)

    def _rows(self, heads: Tensor) -> Tensor:
        return heads.reshape(-1, self.weight.shape[-1])

    def trainable(self) -> list[Tensor]:
        return [self.weight] if self.weight.requires_grad else []

    def forward(
        self,
        x: Tensor,
        dtype: torch.dtype,
        *,
        residual: Tensor | None = None,
        fp8: bool = False,
        int8: bool = False,
    ) -> tuple[Operand, Tensor]:
        """The norm of x (+ residual) in `dtype`, with `fp8` or `int8` quantised in the same pass, and what was
        normalised."""
        if self.centred:
            summed = x if residual is None else x + residual
            return Operand(layer_norm_forward(summed, self.weight, self.eps, out_dtype=dtype)), summed
        if int8 and x.dtype == dtype:
            y, _, summed, rows = rms_norm_forward_int8(
                x, self.weight, self.eps, residual=residual, weight_offset=self.offset
            )
            return Operand(y, int8=rows), summed
        options = {"residual": residual, "weight_offset": self.offset, "out_dtype": dtype}
        if fp8:
            y, _, summed, rows = rms_norm_forward_fp8(x, self.weight, self.eps, **options)
            return Operand(y, rows), summed
        y, _, summed = rms_norm_forward(x, self.weight, self.eps, **options)
        return Operand(y), summed

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        residual_grad: Tensor | None,
        sink: GradientSink,
        columns: Tensor | Turned | None = None,
    ) -> Operand:
        """Gradient of the normalised x (plus `residual_grad`); the weight's goes to the sink. With `columns` the
        gradient is quantised in the same pass, for the input gradient of the one weight that has these factors."""
        if self.centred:
            dx, dweight = layer_norm_backward(
                dy,
                x,
                self.weight,
                eps=self.eps,
                residual_grad=residual_grad,
                need_weight_grad=sink.wants(self.weight),
            )
            if dweight is not None:
                sink.add(self.weight, dweight)
            return Operand(dx)
        if columns is TURNED and not sink.wants(self.weight):
            dx, codes = rms_norm_backward_int8(
                dy,
                x,
                self.weight,
                None,
                eps=self.eps,
                weight_offset=self.offset,
                residual_grad=residual_grad,
            )
            return Operand(dx, int8=codes)
        options: Any = {
            "eps": self.eps,
            "weight_offset": self.offset,
            "residual_grad": residual_grad,
            "need_weight_grad": sink.wants(self.weight),
        }
        if not isinstance(columns, Tensor):
            dx, dweight = rms_norm_backward(dy, x, self.weight, None, **options)
            found = Operand(dx)
        else:
            dx, dweight, rows = rms_norm_backward_fp8(dy, x, self.weight, None, columns, **options)
            found = Operand(dx, rows, columns)
        if dweight is not None:
            sink.add(self.weight, dweight)
        return found


@dataclass(frozen=True)
class NoNorm:
    """In the place of a norm where a family has none: what comes in goes on, and nothing of it is kept twice."""

    weight: None = None

    def trainable(self) -> list[Tensor]:
        return []

    def forward(
        self,
        x: Tensor,
        dtype: torch.dtype,
        *,
        residual: Tensor | None = None,
        fp8: bool = False,
        int8: bool = False,
    ) -> tuple[Operand, Tensor]:
        """x (+ residual) in `dtype`, which may be the sum itself, and the sum."""
        summed = x if residual is None else x + residual
        return Operand(summed.to(dtype)), summed

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        residual_grad: Tensor | None,
        sink: GradientSink,
        columns: Tensor | Turned | None = None,
    ) -> Operand:
        """dy plus `residual_grad`, in x's dtype."""
        return Operand(dy.to(x.dtype) if residual_grad is None else residual_grad + dy.to(x.dtype))
