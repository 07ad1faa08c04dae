"""The adapters, weights and biases of a projection group, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from pronghorn.blocks.projection import adapted
from pronghorn.blocks.projection.parts import (
    Adapter,
    AdapterGrads,
    GradientSink,
    LinearProjection,
    ModuleProjection,
    PackedAdapters,
    Projection,
    product_for,
)
from pronghorn.kernels import lora
from pronghorn.kernels.dispatch import Impl
from pronghorn.kernels.dropout import seeded_dropout
from pronghorn.weights import Fp8Weight, Int8Products, Weight, stacked
from pronghorn.weights.operand import TURNED, Operand, Turned, as_operand


class GroupParameters:
    """What a `ProjectionGroup` holds, by its arguments."""

    def __init__(
        self,
        projections: Sequence[Projection],
        packed: PackedAdapters | None = None,
        impl: Impl | None = None,
    ) -> None:
        self.projections = tuple(projections)
        self.packed, self.impl = packed, impl
        self._pairs = [
            (i, adapter)
            for i, projection in enumerate(self.projections)
            if isinstance(projection, LinearProjection)
            for adapter in projection.adapters
        ]
        self._ranks = [adapter.rank for _, adapter in self._pairs]
        ends = list(accumulate(self._ranks, initial=0))
        self._slices = [slice(start, end) for start, end in pairwise(ends)]
        self.total_rank = ends[-1]
        self._drops = any(adapter.dropout > 0 for _, adapter in self._pairs)
        self._scalings = [adapter.scaling for _, adapter in self._pairs]
        # One adapter a projection: what the kernels take, and what a consumer can add by itself.
        self._single = len({i for i, _ in self._pairs}) == len(self._pairs)

    def trainable(self) -> list[Tensor]:
        return [tensor for projection in self.projections for tensor in projection.trainable()]

    def weights(self) -> list[Weight]:
        """The stored weights; whole modules have none."""
        return [projection.weight for projection in self._all_linear()]

    def has_biases(self) -> bool:
        """Whether a projection or an adapter's B has one."""
        return self._b_biases() or any(projection.bias is not None for projection in self._all_linear())

    def one_share_each(self) -> tuple[list[int], list[float]] | None:
        """Ranks and scalings where each projection has one adapter, none drops anything, and a kernel may add them;
        None otherwise."""
        alone = self._single and len(self._pairs) == len(self.projections)
        return None if not alone or self._drops or self.impl is not None else (self._ranks, self._scalings)

    def _all_linear(self) -> list[LinearProjection]:
        return [p for p in self.projections if isinstance(p, LinearProjection)]

    def down(self, x: Tensor) -> Tensor | None:
        """XA = drop(x) Aᵀ for all adapters of the group: [T, ΣR], or None without adapters."""
        if not self._pairs:
            return None
        if not self._drops:
            return lora.down(x, self._stacked_a(x.dtype), impl=self.impl)
        xa = x.new_empty(x.shape[0], self.total_rank)
        for k, (_, adapter) in enumerate(self._pairs):
            xa[:, self._slices[k]] = dropped(x, adapter) @ self._a(k, x.dtype).t()
        return xa

    def parameter_grads(
        self,
        dys: Sequence[Tensor | Operand],
        x: Tensor,
        xa: Tensor | None,
        grads: AdapterGrads | None,
        sink: GradientSink,
    ) -> None:
        """Gradients of weights, biases, A and B; `xa` None means it was not kept and is rebuilt from x."""
        tensors = [as_operand(dy).tensor for dy in dys]
        for projection, dy in zip(self.projections, tensors, strict=True):
            if isinstance(projection, ModuleProjection):
                continue
            parameter = projection.weight.parameter
            if parameter is not None and sink.wants(parameter):
                sink.add(parameter, product_for(parameter, dy.t(), x))
            if sink.wants(projection.bias):
                sink.add(projection.bias, _token_sum(dy))
        if grads is None:
            return
        self._adapter_a_grads(x, grads.dxa, sink)
        if not grads.b_done:
            self._adapter_b_grads(tensors, x, xa, sink)
        for i, adapter in self._pairs:
            if sink.wants(adapter.b_bias):
                sink.add(adapter.b_bias, _token_sum(tensors[i]).mul_(adapter.scaling))

    def _adapter_b_grads(
        self, dys: Sequence[Tensor], x: Tensor, xa: Tensor | None, sink: GradientSink
    ) -> None:
        buffers = [self._b_grad(k) for k in range(len(self._pairs))]
        wanted = [sink.wants(adapter.b) for _, adapter in self._pairs]
        if not any(wanted) and all(buffer is None for buffer in buffers):
            return
        xa = self.down(x) if xa is None else xa
        assert xa is not None
        for k, (i, adapter) in enumerate(self._pairs):
            part, buffer = xa[:, self._slices[k]], buffers[k]
            if buffer is not None:
                lora.accumulate_product_(buffer, dys[i].t(), part, adapter.scaling)
            elif self.packed is None and wanted[k]:
                sink.add(adapter.b, product_for(adapter.b, dys[i].t(), part).mul_(adapter.scaling))

    def _adapter_a_grads(self, x: Tensor, dxa: Tensor, sink: GradientSink) -> None:
        if self.packed is not None:
            self._packed_a_grads(x, dxa)
            return
        wanted = [sink.wants(adapter.a) for _, adapter in self._pairs]
        if not any(wanted):
            return
        if not self._drops:
            stacked = product_for(self._pairs[0][1].a, dxa.t(), x)
            for (_, adapter), part in zip(self._pairs, self._slices, strict=True):
                sink.add(adapter.a, stacked[part])
            return
        for (_, adapter), part in zip(self._pairs, self._slices, strict=True):
            if sink.wants(adapter.a):
                sink.add(adapter.a, product_for(adapter.a, dxa[:, part].t(), dropped(x, adapter)))

    def _packed_a_grads(self, x: Tensor, dxa: Tensor) -> None:
        assert self.packed is not None
        buffer = self.packed.a_grad
        if buffer is None:
            return
        if not self._drops:
            lora.accumulate_a_(buffer, dxa, x, impl=self.impl)
            return
        for (_, adapter), part in zip(self._pairs, self._slices, strict=True):
            lora.accumulate_product_(buffer[part], dxa[:, part].t(), dropped(x, adapter))

    # --- what products with the weights want ---------------------------------------------------------------

    @cached_property
    def stack(self) -> Weight | None:
        """The frozen weights as one, where they lie side by side."""
        weights = self.weights()
        return stacked(weights) if len(weights) == len(self.projections) else None

    @cached_property
    def _lone_plain(self) -> bool:
        """Whether the group is one weight with at most one adapter and no biases, on no wanted implementation."""
        alone = len(self.projections) == len(self.weights()) == 1 and self.impl is None
        return alone and self._single and not self.has_biases()

    def suits_onto(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether `onto` has a kernel, if the weight lies ready in 16 bits and the sizes fit."""
        return self._lone_plain and adapted.takes_rank(device, dtype, self.total_rank)

    def suits_heads(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether one product makes q, k and v with their adapters, if the weights lie ready in 16 bits, as one, and
        the sizes fit."""
        three = len(self.projections) == len(self._pairs) == len(self.weights()) == 3 and self.impl is None
        plain = three and self._single and not self.has_biases()
        return plain and adapted.takes_rank(device, dtype, max(self._ranks))

    def suits_whole_input_grad(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether one product makes dX with the adapters' share, if the weights lie ready in 16 bits, as one, and the
        sizes fit."""
        plain = bool(self._pairs) and self.impl is None and not self._drops
        linear = len(self.weights()) == len(self.projections)
        return plain and linear and adapted.takes_rank(device, dtype, self.total_rank)

    def fp8_columns(self) -> tuple[Tensor, ...] | None:
        """Exponents int8 [out_i] of the factors that go into each dY before all of them are quantised together; None
        where that is not how the input gradient is made."""
        exponents = tuple(
            w.exponents for w in self.weights() if isinstance(w, Fp8Weight) and w.exponents is not None
        )
        stack = self.stack
        if len(exponents) < len(self.projections) or not isinstance(stack, Fp8Weight):
            return None
        return exponents if stack.exponents is not None else None

    def columns_of_dy(self) -> Tensor | Turned | None:
        """Factors of dY's columns (exponents int8 [out]) with which the kernel that makes dY can quantise it for a lone
        fp8 weight, or that it turns it for an int8 one; None for others."""
        projection = self.projections[0]
        lone = len(self.projections) == 1 and isinstance(projection, LinearProjection)
        weight = projection.weight if lone and isinstance(projection, LinearProjection) else None
        if isinstance(weight, Int8Products):
            return TURNED if weight.turns_output_grads else None
        return weight.exponents if isinstance(weight, Fp8Weight) else None

    @property
    def quantises_rows(self) -> bool:
        """Whether products of the forward pass take the rows of x in fp8."""
        return any(weight.quantises_rows for weight in self.weights())

    @property
    def turns_rows(self) -> bool:
        """Whether products of the forward pass take the rows of x in int8, turned."""
        return any(isinstance(weight, Int8Products) for weight in self.weights())

    # --- parts -------------------------------------------------------------------------------------------------

    def _linear(self, i: int) -> LinearProjection:
        projection = self.projections[i]
        assert isinstance(projection, LinearProjection)
        return projection

    def _all_accumulate(self) -> bool:
        return all(isinstance(p, ModuleProjection) or p.weight.adds_input_grad for p in self.projections)

    def _b_biases(self) -> bool:
        return any(adapter.b_bias is not None for _, adapter in self._pairs)

    def _stacked_a(self, dtype: torch.dtype) -> Tensor:
        """The A matrices as one [ΣR, in]."""
        if self.packed is not None and self.packed.a.dtype == dtype:
            return self.packed.a
        if len(self._pairs) == 1:
            return self._pairs[0][1].a.detach().to(dtype)
        return torch.cat([adapter.a.detach() for _, adapter in self._pairs]).to(dtype)

    def _a(self, k: int, dtype: torch.dtype) -> Tensor:
        if self.packed is not None and self.packed.a.dtype == dtype:
            return self.packed.a[self._slices[k]]
        return self._pairs[k][1].a.detach().to(dtype)

    def _b(self, k: int, dtype: torch.dtype) -> Tensor:
        if self.packed is not None and self.packed.b[k].dtype == dtype:
            return self.packed.b[k]
        return self._pairs[k][1].b.detach().to(dtype)

    def _bs(self, dtype: torch.dtype) -> list[Tensor]:
        return [self._b(k, dtype) for k in range(len(self._pairs))]

    def _b_grad(self, k: int) -> Tensor | None:
        return self.packed.b_grad[k] if self.packed is not None and self.packed.b_grad else None

    def _b_buffer(self, k: int, sink: GradientSink) -> Tensor | None:
        """Where dB of adapter k is accumulated: the packed buffer, or a fresh one that goes to the sink."""
        if self.packed is not None:
            return self._b_grad(k)
        b = self._pairs[k][1].b
        wide = torch.promote_types(b.dtype, torch.float32)
        return torch.zeros(b.shape, dtype=wide, device=b.device) if sink.wants(b) else None

    def _give_b_buffers(self, buffers: Sequence[Tensor | None], sink: GradientSink) -> None:
        if self.packed is not None:
            return
        for (_, adapter), buffer in zip(self._pairs, buffers, strict=True):
            if buffer is not None:
                sink.add(adapter.b, buffer)


def _token_sum(dy: Tensor) -> Tensor:
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))


def dropped(x: Tensor, adapter: Adapter) -> Tensor:
    """x with the adapter's dropout mask; the mask depends on the seed alone, so backward draws the same one."""
    return x if adapter.dropout == 0.0 else seeded_dropout(x, adapter.dropout, adapter.seed)
