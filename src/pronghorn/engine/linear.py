"""One linear layer through the blocks' products, outside of a bound model: what `pronghorn.kernels` offers by the name
that older scripts know, `fast_linear_forward`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pronghorn.blocks import ProjectionGroup
from pronghorn.blocks.projection import GradientSink
from pronghorn.engine.read import Reading, dropout_seed, read_projection


def fast_linear_forward(
    proj: nn.Module, X: Tensor, temp_lora: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """X Wᵀ + b + Σ s · (X Aᵀ) Bᵀ for a linear module, whatever its weight is stored in.

    Differentiable in X, and in the weight, bias, A and B that require a gradient, unless `out` is given. A module that
    the products here do not cover (hooks, DoRA, a class of its own) runs through its own forward.

    Args:
        proj: an nn.Linear, a bitsandbytes Linear4bit or Linear8bitLt, an fp8 linear, or PEFT's LoRA layer around one.
        X: [..., in]; the result has its dtype.
        temp_lora: a buffer of as many elements as X Aᵀ [..., R], which is written to it.
        out: a buffer [..., out] that the result is written to; no graph is kept then.

    Returns:
        [..., out].
    """
    projection = read_projection(proj, Reading(proj.training, dropout_seed(proj.training)), 0)
    group = ProjectionGroup([projection])
    rows = X.reshape(-1, X.shape[-1])
    parameters = group.trainable()
    if out is not None or not torch.is_grad_enabled() or not (rows.requires_grad or parameters):
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            (y,), xa = group.forward(rows)
    else:
        y, xa = _Linear.apply(group, rows, *parameters)
    if temp_lora is not None and xa is not None:
        temp_lora.copy_(xa.detach().view(temp_lora.shape))
    y = y.view(*X.shape[:-1], y.shape[-1])
    return y if out is None else out.copy_(y)


class _Linear(torch.autograd.Function):
    """Arguments: the group of one projection, x [T, in], then its trainable tensors. Returns Y and XA."""

    @staticmethod
    def forward(
        ctx: Any, group: ProjectionGroup, x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(x.device.type, enabled=False):
            (y,), xa = group.forward(x)
        ctx.group, ctx.parameters = group, parameters
        ctx.save_for_backward(x, xa)
        if xa is not None:
            ctx.mark_non_differentiable(xa)
        return y, xa

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
        x, xa = ctx.saved_tensors
        wanted = [p for p, need in zip(ctx.parameters, ctx.needs_input_grad[2:], strict=True) if need]
        sink = GradientSink(wanted)
        dys = [dy.contiguous()]
        with torch.autocast(x.device.type, enabled=False):
            dx, grads = ctx.group.input_grad(dys, x, sink, ctx.needs_input_grad[1], xa=xa)
            ctx.group.parameter_grads(dys, x, xa, grads, sink)
        gradients = {id(p): g for p, g in zip(wanted, sink.gradients, strict=True)}
        return None, dx, *(gradients.get(id(p)) for p in ctx.parameters)
