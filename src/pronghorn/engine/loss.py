"""The loss of a causal LM from its final hidden states: supervised rows only, no full logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pronghorn.blocks import LinearProjection
from pronghorn.families import Scales
from pronghorn.kernels.linear_cross_entropy import Space, default_chunk_rows, linear_cross_entropy
from pronghorn.kernels.loss_rows import put_back

NO_SCALES = Scales()


def without_padding(labels: Tensor, mask: Tensor) -> Tensor:
    """Labels [B, S] less those that a padding position would predict: with padding on the left, each row's first."""
    return labels.masked_fill(torch.nn.functional.pad(mask, (1, 0))[:, :-1] == 0, -100)


def shifted_loss(
    head: LinearProjection,
    hidden_states: Tensor,
    labels: Tensor,
    loss_rows: Tensor | None,
    num_items_in_batch: Tensor | int | None,
    space: Space = "usual",
    scales: Scales = NO_SCALES,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the rows that have a supervised successor; see `causal_lm_forward`.

    `space`: for chunks of logits. Of `scales` those of the logits count.
    """
    rows, targets = supervised_rows(hidden_states, labels, loss_rows)
    return summed_loss(head, rows, targets, num_items_in_batch, space, scales)


def supervised_rows(hidden_states: Tensor, labels: Tensor, loss_rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows [n, H] of [B, S, H] that have a supervised successor, and their targets [n].

    `loss_rows` may hold rows without one, to fill it up to a size: they count nothing and get a zero gradient.
    """
    batch, length = labels.shape
    # Row t predicts label t + 1; the last position of each row predicts nothing.
    successors = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].reshape(batch * length)
    if loss_rows is None:
        loss_rows = (successors != -100).nonzero().squeeze(1)
    flat = hidden_states.reshape(batch * length, -1)
    rows = _TakeRows.apply(flat, loss_rows)
    return rows, successors.index_select(0, loss_rows)


def summed_loss(
    head: LinearProjection,
    rows: Tensor,
    targets: Tensor,
    normalizer: Tensor | int | None,
    space: Space = "usual",
    scales: Scales = NO_SCALES,
) -> tuple[Tensor, Tensor]:
    """Σ CE(head(rows [n, H]), targets [n]) / normalizer (None: their number), and how many predictions are right."""
    weight = head.weight
    dtype = rows.dtype
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
    stored = weight.dense(dtype) if weight.parameter is None else weight.parameter.to(dtype)
    adapter = head.adapters[0] if head.adapters else None
    with torch.autocast(rows.device.type, enabled=False):
        return linear_cross_entropy(
            rows.to(dtype),
            stored,
            targets,
            bias=head.bias,
            lora=None if adapter is None else (adapter.a, adapter.b, adapter.scaling),
            normalizer=normalizer,
            logit_scale=scales.logits,
            softcap=scales.logit_softcap,
            chunk_rows=default_chunk_rows(stored.shape[0], dtype.itemsize, rows.device.type, space),
        )


def scaled_logits(logits: Tensor, scales: Scales) -> Tensor:
    """What a family makes of lm_head's output: c · tanh(scale · logits / c)."""
    if scales.logits != 1.0:
        logits = logits * scales.logits
    cap = scales.logit_softcap
    return logits if cap is None else torch.tanh(logits / cap) * cap


class _TakeRows(torch.autograd.Function):
    """x [T, H] at `rows` [n]. Backward writes each row once, where index_select's adds atomically."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.length = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,), grad = ctx.saved_tensors, grads[0]
        return put_back(grad, rows, ctx.length), None
