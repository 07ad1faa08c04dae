"""Projections of one input with all their adapters: the products of forward and backward, in the order that reads
and writes the tall matrices least.

The adapters' small product comes first and the frozen product is added to it inside the matrix multiplication
(beta = 1), so that the large result is not read a second time. A storage that cannot add in place
(`Weight.adds_forward`, `Weight.adds_input_grad`) takes the other order; one that adds adapters itself (`Weight.fuses`)
makes each output, and dX of the group, in one launch, and so does a kernel for weights in 16 bits (`adapted`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from pronghorn.blocks.projection import adapted
from pronghorn.blocks.projection.fused import FUSED_RANK, all_fuse, sum_of_products
from pronghorn.blocks.projection.parameters import GroupParameters, dropped
from pronghorn.blocks.projection.parts import (
    AdapterGrads,
    GradientSink,
    LinearProjection,
    ModuleProjection,
    PackedAdapters,
    Projection,
)
from pronghorn.kernels import lora, tiles
from pronghorn.weights import DenseWeight, Fp8Weight, Int8Products, side_by_side
from pronghorn.weights.operand import Operand, as_operand


class ProjectionGroup(GroupParameters):
    """Projections that read the same input (q, k, v; gate, up) or a single one (o; down).

    Args:
        packed: the group's adapters in the compute dtype, with buffers that gradients are accumulated into; those
            gradients are then not given to the sink. None: adapters are cast and stacked here, in every call.
        impl: which implementation of the adapter kernels runs; None chooses by device.
    """

    # --- forward -----------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor | Operand,
        defer_adapters: bool = False,
        xa: Tensor | None = None,
        joined: bool = False,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Outputs Y_i [T, out_i] and XA [T, ΣR] (None without adapters) for x [T, in].

        With `defer_adapters` the outputs lack what `deferred` gives, which the caller adds on the fly. With `joined`
        they may be columns of one matrix.
        """
        operand = as_operand(x)
        xa = self.down(operand.tensor) if xa is None else xa
        if self.fuses:
            return [self._fused(i, operand, xa) for i in range(len(self.projections))], xa
        made = None if defer_adapters else self._adapted(operand, xa)
        if made is not None:
            return [made], xa
        deferring = defer_adapters and xa is not None and self.defers(xa)
        if joined and (xa is None or deferring) and self.stack is not None and self._biases_alike():
            wide = self.stack.matmul(operand, self._stacked_bias(operand.tensor.dtype))
            return list(wide.split([p.weight.shape[0] for p in self._all_linear()], 1)), xa
        outs: list[Tensor | None] = [None] * len(self.projections)
        if xa is not None and not deferring:
            self._start_with_adapters(outs, xa)
        for i, projection in enumerate(self.projections):
            outs[i] = self._finish(projection, operand, outs[i])
        done = [out for out in outs if out is not None]
        if xa is not None and not deferring:
            self._add_late_adapters_(done, xa)
        return done, xa

    def rotated_heads(
        self, x: Tensor | Operand, cos: Tensor, sin: Tensor
    ) -> tuple[list[Tensor] | None, Tensor | None]:
        """q, k and v with their adapters, q and k rotated by halves, by one launch, None where no kernel does that; XA,
        or None where `forward` is to form it."""
        operand = as_operand(x)
        suits = self.suits_heads(operand.tensor.device, operand.tensor.dtype) and not self.fuses
        xa = self.down(operand.tensor) if suits else None
        if xa is None:
            return None, None
        shares = [self._share(i, xa) for i in range(3)]
        made = adapted.heads(self.stack, operand.tensor, shares, xa, (cos, sin))
        return None if made is None else list(made), xa

    @property
    def is_one_matrix(self) -> bool:
        """Whether the outputs are columns of one module's (`SplitGroup`)."""
        return False

    def of_outputs(self, dys: list[Tensor]) -> list[Tensor]:
        """Gradients of `forward`'s outputs as `input_grad` and `parameter_grads` take them, one a projection."""
        return dys

    def _biases_alike(self) -> bool:
        return len({p.bias is None for p in self._all_linear()}) == 1

    def _stacked_bias(self, dtype: torch.dtype) -> Tensor | None:
        """The biases as one [Σout]."""
        biases = [p.bias.detach() for p in self._all_linear() if p.bias is not None]
        if not biases:
            return None
        whole = side_by_side(biases, 0)
        return (torch.cat(biases) if whole is None else whole).to(dtype)

    def forward_residual(
        self, residual: Tensor, x: Tensor | Operand, xa: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """residual [T, out] + Y as a new tensor in residual's dtype, and XA; for a group of one.

        `xa` is given where the kernel that made x has formed it (`a_for_producer`).
        """
        (projection,) = self.projections
        operand = as_operand(x)
        same = residual.dtype == operand.tensor.dtype
        if not isinstance(projection, LinearProjection) or projection.bias is not None or not same:
            (y,), xa = self.forward(
                operand, xa=xa
            )  # as `forward_add_` does: the same numbers at every save level
            return residual + y, xa
        xa = self.down(operand.tensor) if xa is None else xa
        if self.fuses:
            return self._fused(0, operand, xa, residual), xa
        made = self._adapted(operand, xa, residual)
        if made is not None:
            return made, xa
        if not self._single or self._b_biases() or xa is None:
            out = residual.clone()
            projection.weight.matmul_add_(out, operand)
            if xa is not None:
                self._add_adapters_([out], xa)
            return out, xa
        bs, scalings = self._bs(xa.dtype), self._scalings
        if projection.weight.adds_forward:
            (out,) = lora.up(xa, bs, scalings, [residual], impl=self.impl)
            return projection.weight.matmul_add_(out, operand), xa
        y = projection.weight.matmul(operand)
        (out,) = lora.up(xa, bs, scalings, [residual], addends=[y], impl=self.impl)
        return out, xa

    def forward_add_(self, out: Tensor, x: Tensor | Operand, xa: Tensor | None = None) -> Tensor | None:
        """out [T, out] += Y for a group of one; returns XA. Saves a pass over the output."""
        (projection,) = self.projections
        operand = as_operand(x)
        if self.fuses:
            return self._add_fused_(out, operand, xa)
        if isinstance(projection, ModuleProjection) or out.dtype != operand.tensor.dtype:
            (y,), xa = self.forward(operand, xa=xa)
            out.add_(y)
            return xa
        xa = self.down(operand.tensor) if xa is None else xa
        if projection.bias is not None:
            out.add_(projection.cast_bias(out.dtype))
        if self._adapted(operand, xa, out, out) is not None:
            return xa
        if xa is None or not self._single or self._b_biases():
            projection.weight.matmul_add_(out, operand)
            if xa is not None:
                self._add_adapters_([out], xa)
            return xa
        # The sums and roundings of `forward_residual`.
        bs, scalings = self._bs(xa.dtype), self._scalings
        if projection.weight.adds_forward:
            lora.up(xa, bs, scalings, [out], inplace=True, impl=self.impl)
            projection.weight.matmul_add_(out, operand)
        else:
            y = projection.weight.matmul(operand)
            lora.up(xa, bs, scalings, [out], addends=[y], inplace=True, impl=self.impl)
        return xa

    def onto(
        self, residual: Tensor, x: Tensor, xa: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """residual [T, out] + Y of a group of one as a new tensor by one launch, None where no kernel does that; XA."""
        xa = self.down(x) if xa is None else xa
        same = residual.dtype == x.dtype
        return (self._adapted(as_operand(x), xa, residual) if same else None), xa

    def _adapted(
        self,
        operand: Operand,
        xa: Tensor | None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor | None:
        """Y (+ residual) by one launch, for a group of one without biases, where there is a kernel that takes it."""
        lone = self.projections[0] if self._lone_plain else None
        if not isinstance(lone, LinearProjection) or (xa is None and residual is None):
            return None
        share = None if xa is None else self._share(0, xa)
        return adapted.output(lone.weight, operand.tensor, share, residual, out)

    def _add_fused_(self, out: Tensor, operand: Operand, xa: Tensor | None) -> Tensor | None:
        """`forward_add_` in the product itself; a bias or another dtype goes the way of `forward_residual`."""
        same = out.dtype == operand.tensor.dtype and self._linear(0).bias is None
        xa = self.down(operand.tensor) if xa is None else xa
        if same:
            self._fused(0, operand, xa, out, out)
        else:
            out.copy_(self.forward_residual(out, operand, xa)[0])
        return xa

    def a_for_producer(self, rows: Tensor) -> Tensor | None:
        """A [ΣR, in] for a kernel that makes x of as many rows as `rows` and can form XA along the way, or None."""
        if not self._kernels_take(rows) or not isinstance(self.projections[0], LinearProjection):
            return None
        return self._stacked_a(rows.dtype)

    def left_to_producer(self, dy: Tensor, xa: Tensor | None, sink: GradientSink) -> PackedAdapters | None:
        """The adapter whose share of dX and gradient of A the kernel that goes on with dX can form along the way, or
        None; `parameter_grads` has nothing left to do then. `input_grad` is to be called with `xa` and deferring."""
        if self.packed is None or self.packed.a_grad is None or xa is None or not self._kernels_take(dy):
            return None
        projection = self.projections[0]
        if not isinstance(projection, LinearProjection) or self._b_biases():
            return None
        others = sink.wants(projection.weight.parameter) or sink.wants(projection.bias)
        return None if others else self.packed

    def _kernels_take(self, rows: Tensor) -> bool:
        lone = len(self.projections) == 1 and len(self._pairs) == 1 and not self._drops
        width = self._pairs[0][1].a.shape[1] if lone else 0
        return (
            lone
            and lora.fits_kernels(rows, self._ranks, self.impl)
            and lora.producer_wins(rows.shape[0], width, self.total_rank)
        )

    def defers(self, xa: Tensor) -> bool:
        """Whether consumers add the adapters on the fly; the same answer in forward and backward."""
        return (
            self._single
            and not self._b_biases()
            and not self.fuses
            and lora.fits_kernels(xa, self._ranks, self.impl, lora.DEFERRED_RANK)
        )

    def deferred(self, i: int, xa: Tensor | None) -> lora.LowRank | None:
        """What is missing from output i of `forward(..., defer_adapters=True)`; None when nothing is."""
        return None if xa is None or not self.defers(xa) else self._share(i, xa)

    def share(self, i: int, xa: Tensor) -> lora.LowRank:
        """The adapter's share of output i, which has one."""
        found = self._share(i, xa)
        assert found is not None
        return found

    def _share(self, i: int, xa: Tensor) -> lora.LowRank | None:
        """The adapter's share of output i, where that has one."""
        for k, (owner, adapter) in enumerate(self._pairs):
            if owner == i:
                return lora.LowRank(xa[:, self._slices[k]], self._b(k, xa.dtype), adapter.scaling)
        return None

    @cached_property
    def fuses(self) -> bool:
        """Whether each product adds its adapter's share itself, and a residual."""
        plain = self._single and not self._b_biases() and max(self._ranks, default=0) <= FUSED_RANK
        return plain and all_fuse(self.projections)

    def _fused(
        self,
        i: int,
        operand: Operand,
        xa: Tensor | None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Output i with all that belongs to it, into `out` where that is given."""
        projection = self._linear(i)
        share = None if xa is None else self._share(i, xa)
        bias = projection.cast_bias(operand.tensor.dtype)
        return projection.weight.matmul_fused(operand, share, residual, bias, out)

    def _start_with_adapters(self, outs: list[Tensor | None], xa: Tensor) -> None:
        """Fill the outputs whose weight adds in place with bias + adapter; several in one launch."""
        ready = [
            k for k, (i, _) in enumerate(self._pairs) if self._single and self._linear(i).weight.adds_forward
        ]
        if not ready:
            return
        bases = [self._linear(self._pairs[k][0]).cast_bias(xa.dtype) for k in ready]
        if len(ready) == len(self._pairs):
            ys = lora.up(xa, self._bs(xa.dtype), self._scalings, bases, impl=self.impl)
        else:
            ys = [
                lora.up(
                    xa[:, self._slices[k]],
                    [self._b(k, xa.dtype)],
                    [self._scalings[k]],
                    [base],
                    impl=self.impl,
                )[0]
                for k, base in zip(ready, bases, strict=True)
            ]
        for k, y in zip(ready, ys, strict=True):
            i, adapter = self._pairs[k]
            if adapter.b_bias is not None:
                y.add_(adapter.b_bias.detach().to(xa.dtype), alpha=adapter.scaling)
            outs[i] = y

    def _finish(self, projection: Projection, operand: Operand, started: Tensor | None) -> Tensor:
        """X Wᵀ + b, added to what `_start_with_adapters` began."""
        if isinstance(projection, ModuleProjection):
            return projection.forward(operand.tensor)
        if started is not None:
            return projection.weight.matmul_add_(started, operand)
        return projection.weight.matmul(operand, projection.cast_bias(operand.tensor.dtype))

    def _add_late_adapters_(self, outs: list[Tensor], xa: Tensor) -> None:
        """Adapters of outputs that `_start_with_adapters` left out."""
        late = [
            k
            for k, (i, _) in enumerate(self._pairs)
            if not (self._single and self._linear(i).weight.adds_forward)
        ]
        if not late:
            return
        if self._single and len(late) == len(self._pairs) and not self._b_biases():
            bases = [outs[i] for i, _ in self._pairs]
            lora.up(xa, self._bs(xa.dtype), self._scalings, bases, inplace=True, impl=self.impl)
        else:
            self._add_adapters_(outs, xa, late)

    def _add_adapters_(self, outs: list[Tensor], xa: Tensor, which: Sequence[int] | None = None) -> None:
        for k in range(len(self._pairs)) if which is None else which:
            i, adapter = self._pairs[k]
            out = outs[i]
            part, b = xa[:, self._slices[k]], self._b(k, xa.dtype)
            if out.dtype == xa.dtype:
                out.addmm_(part, b.t(), alpha=adapter.scaling)
            else:
                out.add_(part @ b.t(), alpha=adapter.scaling)
            if adapter.b_bias is not None:
                out.add_(adapter.b_bias.detach().to(out.dtype), alpha=adapter.scaling)

    # --- backward ----------------------------------------------------------------------------------------------

    def input_grad(
        self,
        dys: Sequence[Tensor | Operand],
        x: Tensor | Callable[[], Tensor],
        sink: GradientSink,
        need: bool = True,
        xa: Tensor | None = None,
        defer_adapters: bool = False,
        joined: bool = True,
        of_stack: Operand | None = None,
    ) -> tuple[Tensor | None, AdapterGrads | None]:
        """dX [T, in] (None unless `need`), and the adapters' output gradients for `parameter_grads`.

        The input `x` is needed only by module projections, whose parameter gradients are collected here too; a
        caller that would have to compute it passes a function. With `xa` (the group's XA, where it was kept) the
        gradients of B are formed in the same reading of dY. With `defer_adapters` (see `left_to_producer`) dX lacks the
        adapters' share. With `joined` dY that are columns of one matrix are multiplied by the weights as one;
        `of_stack` is that operand where it was made on the way, for an fp8 stack (`fp8_columns`).
        """
        operands = [as_operand(dy) for dy in dys]
        starts = need and not defer_adapters and not self._drops and self._all_accumulate()
        whole = self._adapted_input_grad(operands, joined) if starts else None
        if whole is not None:
            weight, dy, a = whole
            grads, _ = self._output_grads([operand.tensor for operand in operands], xa, sink, False)
            assert grads is not None
            return adapted.input_grad(weight, dy, grads.dxa, a), grads
        grads, dx = self._output_grads([operand.tensor for operand in operands], xa, sink, starts)
        if defer_adapters:
            return self._linear(0).weight.matmul_t(operands[0]), grads
        if need and all_fuse(self.projections) and (grads is None or self._fits_epilogue()):
            share = (
                None if grads is None else lora.LowRank(grads.dxa, self._stacked_a(grads.dxa.dtype).t(), 1.0)
            )
            return sum_of_products(self._terms(operands, joined, of_stack), share), grads
        if need and grads is not None and self._sums_late(grads.dxa):
            parts = [
                projection.weight.matmul_t(operand)
                for projection, operand in self._terms(operands, joined, of_stack)
                if isinstance(projection, LinearProjection)
            ]
            a = self._stacked_a(grads.dxa.dtype)
            return lora.up(grads.dxa, [a.t()], [1.0], parts[:1], addends=parts[1:], impl=self.impl)[0], grads
        first = dx is not None
        for projection, operand in self._terms(operands, joined, of_stack):
            if isinstance(projection, ModuleProjection):
                part = projection.backward(operand.tensor, x() if callable(x) else x, sink, need)
                dx = part if dx is None else (dx.add_(part) if part is not None else dx)
            elif need:
                weight = projection.weight
                dx = weight.matmul_t(operand) if dx is None else weight.matmul_t_add_(dx, operand)
        if need and grads is not None and not first:
            assert dx is not None
            self._add_adapter_input_grad_(dx, grads.dxa)
        return dx, grads

    def input_grad_columns(
        self, dy: Tensor, sink: GradientSink, xa: Tensor | None = None
    ) -> tuple[Callable[[slice], Tensor], AdapterGrads | None]:
        """For a group of one whose weight is plain or dequantised, and drops nothing: what makes some columns of dX,
        [T, columns], with the roundings of `input_grad` by the matrix library; and the adapters' output gradients for
        `parameter_grads`."""
        grads, _ = self._output_grads([dy], xa, sink, False)
        weight = self._linear(0).weight.dense(dy.dtype)
        a = None if grads is None else self._stacked_a(dy.dtype)

        def columns(which: slice) -> Tensor:
            if grads is None or a is None:
                return dy @ weight[:, which]
            return (grads.dxa @ a[:, which]).addmm_(dy, weight[:, which])

        return columns, grads

    def adapter_output_grads(self, dy: Tensor, xa: Tensor | None, sink: GradientSink) -> AdapterGrads:
        """`input_grad`'s second answer alone, for an adapter whose share of dX another kernel adds."""
        grads, _ = self._output_grads([dy], xa, sink, False)
        assert grads is not None
        return grads

    def _terms(
        self, operands: Sequence[Operand], joined: bool, of_stack: Operand | None
    ) -> list[tuple[Projection, Operand]]:
        """The products that dX is the sum of: one where the weights, and dY if they are to be read so, lie side by
        side."""
        stack, tensors = self.stack, [operand.tensor for operand in operands]
        if isinstance(stack, Int8Products):
            return [(LinearProjection(stack), of_stack or stack.operand_of(tensors))]
        if isinstance(stack, Fp8Weight):
            # dY are read once more anyway, to be quantised.
            return [(LinearProjection(stack), of_stack or Operand.joined(tensors, stack.columns))]
        wide = side_by_side(tensors, 1) if joined and isinstance(stack, DenseWeight) else None
        if stack is None or wide is None:
            return list(zip(self.projections, operands, strict=True))
        return [(LinearProjection(stack), Operand(wide))]

    def _adapted_input_grad(
        self, operands: Sequence[Operand], joined: bool
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The one weight and dY whose product is dX, and A, where a kernel adds the adapters' share to it."""
        if not self._pairs or self.impl is not None or len(self.weights()) < len(self.projections):
            return None
        weight, dy = self.weights()[0], operands[0].tensor
        if len(operands) > 1:
            wide = side_by_side([operand.tensor for operand in operands], 1) if joined else None
            if wide is None or not isinstance(self.stack, DenseWeight):
                return None
            weight, dy = self.stack, wide
        ready = adapted.weight_of_input_grad(weight, dy, self.total_rank)
        if ready is None:
            return None
        a = self._stacked_a(dy.dtype).contiguous()
        return (ready, dy, a) if tiles.aligned(a) else None

    def _fits_epilogue(self) -> bool:
        """Whether the adapters' share of dX, dXA A, is one that a product adds."""
        return not self._drops and self.total_rank <= FUSED_RANK

    def _sums_late(self, dxa: Tensor) -> bool:
        """Whether dX is best summed by one kernel at the end: where no product adds to what is there."""
        return (
            not self._drops
            and len(self._all_linear()) == len(self.projections)
            and not any(p.weight.adds_input_grad for p in self._all_linear())
            and lora.fits_kernels(dxa, [self.total_rank], self.impl)
        )

    def _output_grads(
        self, dys: Sequence[Tensor], xa: Tensor | None, sink: GradientSink, starts: bool
    ) -> tuple[AdapterGrads | None, Tensor | None]:
        """dXA, and gradients of B where XA is there; with `starts` also the adapters' share of dX, a new tensor."""
        if not self._pairs:
            return None, None
        dtype = dys[0].dtype
        of_pairs = [dys[i] for i, _ in self._pairs]
        bs = self._bs(dtype)
        buffers = [] if xa is None else [self._b_buffer(k, sink) for k in range(len(self._pairs))]
        dx: Tensor | None = None
        if starts:
            a = self._stacked_a(dtype)
            dxa, dx = lora.output_grads_and_start(
                of_pairs, bs, self._scalings, a, xa, buffers, impl=self.impl
            )
        else:
            dxa = lora.output_grads(of_pairs, bs, self._scalings, xa, buffers, impl=self.impl)
        if xa is not None:
            self._give_b_buffers(buffers, sink)
        return AdapterGrads(dxa, b_done=xa is not None), dx

    def _add_adapter_input_grad_(self, dx: Tensor, dxa: Tensor) -> None:
        if not self._drops:
            dx.addmm_(dxa, self._stacked_a(dxa.dtype))
            return
        for k, (_, adapter) in enumerate(self._pairs):
            through_a = dxa[:, self._slices[k]] @ self._a(k, dxa.dtype)
            dx.add_(dropped(through_a, adapter))
