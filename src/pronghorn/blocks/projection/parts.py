"""What a projection group is made of: stored weights with adapters, whole modules, and a sink for gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
class PackedAdapters:
    """A group's adapters stored side by side in the compute dtype, and where their gradients go."""

    #: [ΣR, in], compute dtype: the A matrices of the group in order
    a: Tensor
    #: one [out_i, R_i] per adapter, compute dtype
    b: tuple[Tensor, ...]
    #: [ΣR, in] fp32, accumulated into (+=)
    a_grad: Tensor | None = None
    #: [out_i, R_i] fp32, accumulated into (+=)
    b_grad: tuple[Tensor | None, ...] = ()


@dataclass
class AdapterGrads:
    """What `input_grad` hands to `parameter_grads`: dxa = s · dY B [T, ΣR], and whether dB is done already."""

    dxa: Tensor
    b_done: bool = False


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


def rows_are_independent(projections: Iterable[Projection], trained: Iterable[Tensor]) -> bool:
    """Whether tiles of rows give what all rows at once give: modules of their own and dropout masks may depend on the
    number of rows, and gradients in 16 bits, of what is `trained`, would be rounded at every tile."""
    return all(
        isinstance(projection, LinearProjection) and not any(a.dropout for a in projection.adapters)
        for projection in projections
    ) and all(t.dtype in (torch.float32, torch.float64) for t in trained)


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
