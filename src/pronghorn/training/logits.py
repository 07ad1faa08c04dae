"""The loss from full logits: for models that the engine does not run, and for losses it does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pronghorn.data.rows import IGNORED


def loss_from_logits(
    outputs: Any,
    labels: Tensor,
    normalizer: Tensor | int,
    loss_function: Callable[..., Tensor] | None = None,
    label_smoother: Any = None,
    loss_type: str = "nll",
) -> tuple[Tensor, Tensor]:
    """(Σ loss of supervised tokens / normalizer, number of right predictions) from logits [B, S, V], labels [B, S].

    In order: the user's loss function, label smoothing, then by `loss_type`
        nll: -log p        dft: -p·log p with p taken as a constant (https://huggingface.co/papers/2508.05629)
    """
    labels = labels.to(outputs.logits.device)
    logits, targets = _shifted(outputs.logits, labels)
    correct = right_predictions(outputs.logits, labels)
    if loss_function is not None:
        return loss_function(outputs, labels, num_items_in_batch=normalizer), correct
    if label_smoother is not None:
        return label_smoother(outputs, labels, shift_labels=True, num_items_in_batch=normalizer), correct
    reduction = "none" if loss_type == "dft" else "sum"
    loss = cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction=reduction
    )
    if loss_type == "dft":
        loss = (loss * torch.exp(-loss.detach())).sum()
    return loss / normalizer, correct


def _shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the labels they predict; prompt learning puts virtual tokens in front of the logits' rows."""
    return logits[:, -labels.shape[1] :][:, :-1], labels[:, 1:]


def right_predictions(logits: Tensor, labels: Tensor) -> Tensor:
    """Number of supervised labels [B, S] that are the largest of the logits [B, S, V] before them."""
    predicted, targets = _shifted(logits.detach(), labels.to(logits.device))
    return ((predicted.argmax(-1) == targets) & (targets != IGNORED)).sum()
