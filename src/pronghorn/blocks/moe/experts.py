"""A projection of all experts with adapters: forward, input gradient and parameter gradients over sorted rows.

    y[s]  = x[s] W[e]ᵀ + b[e] + x[s] A[e]ᵀ (c · B[e])ᵀ,    e the expert of row s, c the adapter's scaling
    dxa   = dy (c · B),   dx = dy W + dxa A,   dA[e] = Σ dxaᵀ x,   dB[e] = c · Σ dyᵀ (x Aᵀ),   dW[e] = Σ dyᵀ x

PEFT keeps the adapters of a stack as two matrices: A [E · R, in], the rows of an expert together, and B [out, R · E],
the columns of a rank together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pronghorn.blocks.projection import GradientSink
from pronghorn.kernels.grouped_adapters import stack_b, unstack_b
from pronghorn.kernels.grouped_matmul import Groups, LowRankRows, grouped_matmul, grouped_outer
from pronghorn.weights.experts import ExpertWeight


@dataclass(frozen=True)
class ExpertAdapter:
    """One LoRA of a stack, as PEFT keeps it: a [E · R, in], b [out, R · E]."""

    a: Tensor
    b: Tensor
    scaling: float
    experts: int

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.experts

    def stacked_a(self) -> Tensor:
        """A [E, R, in], a view."""
        return self.a.detach().view(self.experts, self.rank, -1)

    def stacked_b(self, dtype: torch.dtype) -> Tensor:
        """c · B [E, out, R]."""
        return stack_b(self.b.detach(), self.experts, self.scaling, dtype)

    def give_a(self, gradient: Tensor, sink: GradientSink) -> None:
        """dA [E, R, in] to the sink."""
        sink.add(self.a, gradient.reshape(self.a.shape))

    def give_b(self, gradient: Tensor, sink: GradientSink) -> None:
        """dB [E, out, R], yet without the scaling, to the sink."""
        sink.add(self.b, unstack_b(gradient, self.scaling))


class ExpertProjection:
    """Stacked weights [E, out, in], their biases [E, out] and active adapters."""

    def __init__(
        self, weight: ExpertWeight, bias: Tensor | None = None, adapters: Sequence[ExpertAdapter] = ()
    ) -> None:
        self.weight, self.bias, self.adapters = weight, bias, tuple(adapters)

    @property
    def total_rank(self) -> int:
        return sum(adapter.rank for adapter in self.adapters)

    def trainable(self) -> list[Tensor]:
        tensors = [self.weight.parameter, self.bias, *(t for x in self.adapters for t in (x.a, x.b))]
        return [t for t in tensors if t is not None and t.requires_grad]

    def forward(
        self, x: Tensor, groups: Groups, bias_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(y [S, out], x Aᵀ [S, ΣR] or None) of x [S, in]; `bias_weights` [S] are factors of the bias."""
        xa = self.xa(x, groups)
        transposed = self.weight.transposed
        low_rank = None if xa is None else _low_rank(xa, self._b(x.dtype), transposed)
        y = grouped_matmul(x, self.weight.dense(x.dtype), groups, transposed=transposed, low_rank=low_rank)
        if self.bias is not None:
            rows = self.bias.detach()[groups.experts]
            y += rows if bias_weights is None else (rows * bias_weights[:, None]).to(y.dtype)
        return y, xa

    def xa(self, x: Tensor, groups: Groups) -> Tensor | None:
        """x Aᵀ [S, ΣR]; None without adapters."""
        return grouped_matmul(x, self._a(x.dtype), groups) if self.adapters else None

    def input_grad(self, dy: Tensor, groups: Groups) -> tuple[Tensor, Tensor | None]:
        """(dx [S, in], dxa [S, ΣR] or None) of dy [S, out]."""
        dxa, low_rank = None, None
        weight, transposed = self.weight.dense(dy.dtype), not self.weight.transposed
        if self.adapters:
            dxa = grouped_matmul(dy, self._b(dy.dtype), groups, transposed=True)
            low_rank = _low_rank(dxa, self._a(dy.dtype).transpose(1, 2), transposed)
        return grouped_matmul(dy, weight, groups, transposed=transposed, low_rank=low_rank), dxa

    def parameter_grads(
        self,
        dy: Tensor,
        x: Tensor,
        xa: Tensor | None,
        dxa: Tensor | None,
        groups: Groups,
        sink: GradientSink,
        bias_weights: Tensor | None = None,
    ) -> None:
        """Gradients of weights, biases, A and B; `xa` None means that it was not kept."""
        parameter = self.weight.parameter
        if parameter is not None and sink.wants(parameter):
            pair = (x, dy) if self.weight.transposed else (dy, x)
            sink.add(parameter, grouped_outer(*pair, groups))
        if self.bias is not None and sink.wants(self.bias):
            rows = dy if bias_weights is None else dy * bias_weights[:, None]
            total = torch.zeros_like(self.bias, dtype=torch.promote_types(rows.dtype, torch.float32))
            sink.add(self.bias, total.index_add_(0, groups.experts, rows.to(total.dtype)))
        if dxa is None:
            return
        if any(sink.wants(adapter.a) for adapter in self.adapters):
            for adapter, part in self._parts(grouped_outer(dxa, x, groups), 1):
                adapter.give_a(part, sink)
        if any(sink.wants(adapter.b) for adapter in self.adapters):
            xa = self.xa(x, groups) if xa is None else xa
            assert xa is not None
            for adapter, part in self._parts(grouped_outer(dy, xa, groups), 2):
                adapter.give_b(part, sink)

    def _parts(self, gradient: Tensor, dim: int) -> list[tuple[ExpertAdapter, Tensor]]:
        parts = gradient.split([adapter.rank for adapter in self.adapters], dim)
        return list(zip(self.adapters, parts, strict=True))

    def _a(self, dtype: torch.dtype) -> Tensor:
        """A of all adapters, [E, ΣR, in]."""
        stacks = [adapter.stacked_a().to(dtype) for adapter in self.adapters]
        return stacks[0] if len(stacks) == 1 else torch.cat(stacks, 1)

    def _b(self, dtype: torch.dtype) -> Tensor:
        """c · B of all adapters, [E, out, ΣR]."""
        stacks = [adapter.stacked_b(dtype) for adapter in self.adapters]
        return stacks[0] if len(stacks) == 1 else torch.cat(stacks, 2)


def _low_rank(left: Tensor, right: Tensor, transposed: bool) -> LowRankRows:
    """An adapter's share by left [S, R] and right [E, outputs, R] of a product whose weights may lie transposed."""
    return LowRankRows(left, right.transpose(1, 2) if transposed else right)
