"""Exact gradients of a large contrastive batch in the memory of a small one (Gao et al. 2021).

A loss over all vectors of a batch depends on a parameter θ through the vectors alone:

    dL/dθ = Σ_i (dL/dv_i) · dv_i/dθ

So the vectors are computed part by part without keeping anything, the loss gives dL/dv on them, and each part runs once
more with its gradient handed in. What a batch of any size takes is one part's memory and a second forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: torch's random state: of the CPU, and of each GPU
RandomState = tuple[Tensor, list[Tensor]]


def backward(
    parts: Sequence[Any],
    forward: Callable[[Any], Tensor],
    loss_of: Callable[[Tensor], Tensor],
    run_backward: Callable[[Tensor], Any] = Tensor.backward,
) -> Tensor:
    """Run forward and backward of a batch in parts; one part is one plain pass.

    Args:
        forward: of a part, its vectors [n_i, H]. Random numbers that it draws are the same in both passes.
        loss_of: of all vectors [Σ n_i, H], the loss.
        run_backward: of a scalar; a trainer's own scales and accumulates.

    Returns:
        the loss, detached.
    """
    if len(parts) == 1:
        loss = loss_of(forward(parts[0]))
        run_backward(loss)
        return loss.detach()
    # A scalar whose gradient with respect to the vectors is theirs: trainers take nothing else.
    return in_two_passes(parts, forward, loss_of, lambda part, g: run_backward((forward(part) * g).sum()))


def in_two_passes(
    parts: Sequence[Any],
    vectors_of: Callable[[Any], Tensor],
    loss_of: Callable[[Tensor], Tensor],
    differentiate: Callable[[Any, Tensor], Any],
) -> Tensor:
    """Vectors of every part, their loss and dL/dv; then every part's gradients.

    Args:
        differentiate: adds the gradients of a part whose vectors' gradient is given.

    Returns:
        the loss, detached.
    """
    states, found = [], []
    with torch.no_grad():
        for part in parts:
            states.append(_random_state())
            found.append(vectors_of(part))
    vectors = torch.cat(found).requires_grad_()
    loss = loss_of(vectors)
    (gradients,) = torch.autograd.grad(loss, vectors)
    for part, state, gradient in zip(parts, states, gradients.split([len(v) for v in found]), strict=True):
        with _replayed(state):
            differentiate(part, gradient)
    return loss.detach()


def _random_state() -> RandomState:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


@contextmanager
def _replayed(state: RandomState) -> Iterator[None]:
    """Draw what was drawn from `state` on; afterwards numbers go on from where they are now."""
    with torch.random.fork_rng(devices=range(len(state[1]))):
        torch.set_rng_state(state[0])
        if state[1]:
            torch.cuda.set_rng_state_all(state[1])
        yield
