"""Linear projections with adapters: explicit forward, input gradient and parameter gradients.

For projections i that share their input X [T, in]:

    Y_i  = X W_iᵀ + b_i + Σ_adapters s · drop(X) Aᵀ Bᵀ
    dX   = Σ_i dY_i W_i + Σ_adapters drop'(s · dY_i B · A)
    dA   = (s · dY_i B)ᵀ drop(X),   dB = s · dY_iᵀ (drop(X) Aᵀ),   dW_i = dY_iᵀ X,   db_i = Σ_t dY_i

(LoRA, arXiv 2106.09685; `s` is lora_alpha / r, or lora_alpha / √r with rsLoRA.) Adapters of one group that drop
nothing share one product with X: their A matrices are stacked to [ΣR, in].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from pronghorn.kernels.dropout import seeded_dropout
from pronghorn.weights import Weight


class GradientSink:
    """Collects the gradients of a layer's trainable tensors in the order autograd expects them."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._index = {id(parameter): i for i, parameter in enumerate(parameters)}
        self.gradients: list[Tensor | None] = [None] * len(parameters)

    def wants(self, parameter: Tensor | None) -> bool:
        return parameter is not None and id(parameter) in self._index

    def add(self, parameter: Tensor | None, gradient: Tensor) -> None:
        """Add to a parameter's gradient; one that is not collected here is ignored."""
        if parameter is None or id(parameter) not in self._index:
            return
        i = self._index[id(parameter)]
        gradient = gradient.to(parameter.dtype)
        held = self.gradients[i]
        self.gradients[i] = gradient if held is None else held + gradient


def product_for(parameter: Tensor, left_t: Tensor, right: Tensor) -> Tensor:
    """leftᵀ [m, T] @ right [T, n] as a gradient of `parameter`: kept in fp32 where the parameter is fp32.

    The GPU's matrix units accumulate in fp32 anyway; `out_dtype` saves the rounding to 16 bits in between.
    """
    if (
        parameter.dtype == torch.float32
        and left_t.is_cuda
        and left_t.dtype in (torch.bfloat16, torch.float16)
    ):
        return torch.mm(left_t, right, out_dtype=torch.float32)
    return left_t @ right


@dataclass(frozen=True)
class Adapter:
    """One LoRA pair: a [R, in], b [out, R]; `b_bias` [out] is PEFT's optional bias of B."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float = 0.0
    seed: int = 0
    b_bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class LinearProjection:
    """A stored weight, its bias and its active adapters."""

    weight: Weight
    bias: Tensor | None = None
    adapters: tuple[Adapter, ...] = ()

    def trainable(self) -> list[Tensor]:
        tensors = [self.weight.parameter, self.bias]
        for adapter in self.adapters:
            tensors += [adapter.a, adapter.b, adapter.b_bias]
        return [t for t in tensors if t is not None and t.requires_grad]

    def cast_bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.bias is None else self.bias.detach().to(dtype)


class ModuleProjection:
    """A projection run through its own module, for what the formulas above do not cover (DoRA, hooks, …).

    Backward runs the module a second time to get its graph; random numbers are replayed.
    """

    def __init__(self, module: nn.Module, reason: str) -> None:
        self.module, self.reason = module, reason
        self._rng: list[Tensor] | None = None

    def trainable(self) -> list[Tensor]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self._rng is not None:  # a recomputation: the same random numbers again
                y = self._replay(x)
            else:
                self._rng = _rng_state(x.device) if self.module.training else None
                y = self._call(x)
            # The blocks write over a projection's output, which a hook may have kept.
            return y.clone()

    def backward(self, dy: Tensor, x: Tensor, sink: GradientSink, need_input_grad: bool) -> Tensor | None:
        parameters = [p for p in self.trainable() if sink.wants(p)]
        with torch.enable_grad():
            x = x.detach().requires_grad_(need_input_grad)
            y = self._replay(x)
        wanted = ([x] if need_input_grad else []) + parameters
        if not wanted or not y.requires_grad:
            return torch.zeros_like(x) if need_input_grad else None
        gradients = list(torch.autograd.grad(y, wanted, dy, allow_unused=True))
        dx = gradients.pop(0) if need_input_grad else None
        if need_input_grad and dx is None:  # a hook put something in the output's place
            dx = torch.zeros_like(x)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sink.add(parameter, gradient)
        return dx

    def _call(self, x: Tensor) -> Tensor:
        low = x.dtype in (torch.bfloat16, torch.float16)
        # Without autocast's cache, where a parameter cast under no_grad could be met again by a backward's replay.
        with torch.autocast(x.device.type, x.dtype if low else None, enabled=low, cache_enabled=False):
            # As in a packed batch, [1, T, in]: a hook's `output[:, -1]` means the last token.
            return self.module(x[None])[0].to(x.dtype)

    def _replay(self, x: Tensor) -> Tensor:
        if self._rng is None:
            return self._call(x)
        devices = [x.device] if x.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self._rng[0])
            if x.is_cuda:
                torch.cuda.set_rng_state(self._rng[1], x.device)
            return self._call(x)


def _rng_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


Projection = LinearProjection | ModuleProjection


class ProjectionGroup:
    """Projections that read the same input (q, k, v; gate, up) or a single one (o; down)."""

    def __init__(self, projections: Sequence[Projection]) -> None:
        self.projections = tuple(projections)
        self._pairs = [
            (i, adapter)
            for i, projection in enumerate(self.projections)
            if isinstance(projection, LinearProjection)
            for adapter in projection.adapters
        ]
        ends = list(accumulate((adapter.rank for _, adapter in self._pairs), initial=0))
        self._slices = [slice(start, end) for start, end in pairwise(ends)]
        self.total_rank = ends[-1]
        self._drops = any(adapter.dropout > 0 for _, adapter in self._pairs)

    def trainable(self) -> list[Tensor]:
        return [tensor for projection in self.projections for tensor in projection.trainable()]

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Outputs Y_i [T, out_i] and XA [T, ΣR] (None without adapters) for x [T, in]."""
        outs = []
        for projection in self.projections:
            if isinstance(projection, ModuleProjection):
                outs.append(projection.forward(x))
            else:
                outs.append(projection.weight.matmul(x, projection.cast_bias(x.dtype)))
        xa = self.down(x)
        self._add_adapters_(outs, xa)
        return outs, xa

    def forward_add_(self, out: Tensor, x: Tensor) -> Tensor | None:
        """out [T, out] += Y for a group of one; returns XA. Saves a pass over the output."""
        (projection,) = self.projections
        if isinstance(projection, ModuleProjection) or out.dtype != x.dtype:
            (y,), xa = self.forward(x)
            out.add_(y)
            return xa
        projection.weight.matmul_add_(out, x)
        if projection.bias is not None:
            out.add_(projection.cast_bias(out.dtype))
        xa = self.down(x)
        self._add_adapters_([out], xa)
        return xa

    def _add_adapters_(self, outs: list[Tensor], xa: Tensor | None) -> None:
        if xa is None:
            return
        for (i, adapter), part in zip(self._pairs, self._slices, strict=True):
            outs[i].addmm_(xa[:, part], adapter.b.detach().to(xa.dtype).t(), alpha=adapter.scaling)
            if adapter.b_bias is not None:
                outs[i].add_(adapter.b_bias.detach().to(xa.dtype), alpha=adapter.scaling)

    def _stacked_a(self, dtype: torch.dtype) -> Tensor:
        """The A matrices as one [ΣR, in]."""
        if len(self._pairs) == 1:
            return self._pairs[0][1].a.detach().to(dtype)
        return torch.cat([adapter.a.detach() for _, adapter in self._pairs]).to(dtype)

    def down(self, x: Tensor) -> Tensor | None:
        """XA = drop(x) Aᵀ for all adapters of the group: [T, ΣR], or None without adapters."""
        if not self._pairs:
            return None
        if not self._drops:
            return x @ self._stacked_a(x.dtype).t()
        xa = x.new_empty(x.shape[0], self.total_rank)
        for (_, adapter), part in zip(self._pairs, self._slices, strict=True):
            xa[:, part] = _dropped(x, adapter) @ adapter.a.detach().to(x.dtype).t()
        return xa

    def input_grad(
        self, dys: Sequence[Tensor], x: Tensor | Callable[[], Tensor], sink: GradientSink, need: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """dX [T, in] (None unless `need`) and s·dY B [T, ΣR] for `parameter_grads`.

        The input `x` is needed only by module projections, whose parameter gradients are collected here too; a
        caller that would have to compute it passes a function.
        """
        dx: Tensor | None = None
        for projection, dy in zip(self.projections, dys, strict=True):
            if isinstance(projection, ModuleProjection):
                part = projection.backward(dy, x() if callable(x) else x, sink, need)
                dx = part if dx is None else (dx.add_(part) if part is not None else dx)
            elif need:
                dx = projection.weight.matmul_t(dy) if dx is None else projection.weight.matmul_t_add_(dx, dy)
        dxa = self._adapter_output_grad(dys)
        if need and dxa is not None:
            assert dx is not None
            self._add_adapter_input_grad_(dx, dxa)
        return dx, dxa

    def _adapter_output_grad(self, dys: Sequence[Tensor]) -> Tensor | None:
        if not self._pairs:
            return None
        dxa = dys[0].new_empty(dys[0].shape[0], self.total_rank)
        for (i, adapter), part in zip(self._pairs, self._slices, strict=True):
            b, out = adapter.b.detach().to(dxa.dtype), dxa[:, part]
            torch.addmm(out, dys[i], b, beta=0, alpha=adapter.scaling, out=out)
        return dxa

    def _add_adapter_input_grad_(self, dx: Tensor, dxa: Tensor) -> None:
        if not self._drops:
            dx.addmm_(dxa, self._stacked_a(dxa.dtype))
            return
        for (_, adapter), part in zip(self._pairs, self._slices, strict=True):
            through_a = dxa[:, part] @ adapter.a.detach().to(dxa.dtype)
            dx.add_(_dropped(through_a, adapter))

    def parameter_grads(
        self, dys: Sequence[Tensor], x: Tensor, xa: Tensor | None, dxa: Tensor | None, sink: GradientSink
    ) -> None:
        """Gradients of weights, biases, A and B; `xa` None means it was not kept and is rebuilt from x."""
        for projection, dy in zip(self.projections, dys, strict=True):
            if isinstance(projection, ModuleProjection):
                continue
            parameter = projection.weight.parameter
            if parameter is not None and sink.wants(parameter):
                sink.add(parameter, product_for(parameter, dy.t(), x))
            if sink.wants(projection.bias):
                sink.add(projection.bias, dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)))
        if not self._pairs or dxa is None:
            return
        if xa is None and any(sink.wants(adapter.b) for _, adapter in self._pairs):
            xa = self.down(x)
        self._adapter_a_grads(x, dxa, sink)
        for (i, adapter), part in zip(self._pairs, self._slices, strict=True):
            if xa is not None and sink.wants(adapter.b):
                sink.add(adapter.b, product_for(adapter.b, dys[i].t(), xa[:, part]).mul_(adapter.scaling))
            if sink.wants(adapter.b_bias):
                total = dys[i].sum(0, dtype=torch.promote_types(dys[i].dtype, torch.float32))
                sink.add(adapter.b_bias, total.mul_(adapter.scaling))

    def _adapter_a_grads(self, x: Tensor, dxa: Tensor, sink: GradientSink) -> None:
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
                sink.add(adapter.a, product_for(adapter.a, dxa[:, part].t(), _dropped(x, adapter)))


def _dropped(x: Tensor, adapter: Adapter) -> Tensor:
    """x with the adapter's dropout mask; the mask depends on the seed alone, so backward draws the same one."""
    return x if adapter.dropout == 0.0 else seeded_dropout(x, adapter.dropout, adapter.seed)
