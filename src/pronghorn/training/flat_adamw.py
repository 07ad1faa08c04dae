"""AdamW over adapters that lie side by side: one tensor instead of hundreds.

    m = β₁ m + (1 - β₁) g,  v = β₂ v + (1 - β₂) g²,  p = p - lr (m̂ / (√v̂ + ε) + λ p)        (Loshchilov, Hutter 2019)

torch's fused AdamW, element by element the same numbers. Of 448 matrices (8B, rank 16) it takes a launch for every few
dozen, 0.65 ms, and the host two milliseconds to collect them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pronghorn.engine.flat import FlatAdapters


@dataclass(frozen=True)
class _States:
    """Of one flat storage; parameters' own are views of them."""

    flat: FlatAdapters
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    views: tuple[tuple[Tensor, Tensor], ...]


class FlatAdamW(torch.optim.AdamW):
    """torch's fused AdamW, which takes flat storage as one parameter where it can.

    Each parameter has states of its own, as in torch's, so that a checkpoint of either is one of the other.

    Args:
        flats: gives the flat storage there is now, of which every parameter's gradient is in the flat gradient.
    """

    def __init__(self, params: Any, *, flats: Callable[[], Sequence[FlatAdapters]], **options: Any) -> None:
        super().__init__(params, **options, fused=True)
        self._flats = flats
        self._held: list[_States] = []
        #: storage whose parameters have done different numbers of steps
        self._refused: list[FlatAdapters] = []

    @classmethod
    def like(cls, optimizer: torch.optim.AdamW, flats: Callable[[], Sequence[FlatAdapters]]) -> FlatAdamW:
        """The same parameters and options; of an optimizer that has done no step."""
        return cls(optimizer.param_groups, lr=optimizer.defaults["lr"], flats=flats)

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """torch's, which collects a group's tensors in lists: parameters, gradients, both states, the largest second
        states of AMSGrad, and steps."""
        params, grads, exp_avgs, exp_avg_sqs, _, steps = lists
        rest, flats = group["params"], self._flats()
        for held in self._held:
            if not any(held.flat is flat for flat in flats):
                self._let_go(held)
        self._refused = [flat for flat in self._refused if any(flat is other for other in flats)]
        takes = group["fused"] and not group["amsgrad"]
        for flat in flats:
            states = self._states(flat, rest, takes)
            if states is None:
                continue
            mine = set(map(id, flat.parameters))
            rest = [p for p in rest if id(p) not in mine]
            for found, tensor in zip(
                (params, grads, exp_avgs, exp_avg_sqs, steps),
                (flat.values, flat.gradients, states.exp_avg, states.exp_avg_sq, states.step),
                strict=True,
            ):
                found.append(tensor)
        return bool(super()._init_group({**group, "params": rest}, *lists))

    def _states(self, flat: FlatAdapters, params: Sequence[Tensor], takes: bool) -> _States | None:
        """The storage's states; None where some of its parameters are not among these, have done other steps than the
        others, or where the group `takes` no flat storage."""
        here = set(map(id, params))
        held = next((held for held in self._held if held.flat is flat), None)
        missing = sum(id(p) not in here for p in flat.parameters)
        if missing == len(flat.parameters):
            return None
        if held is not None and (missing or not takes or not self._are_there(held)):
            self._let_go(held)
            held = None
        if missing or not takes or any(flat is other for other in self._refused):
            return None
        if held is None:
            held = self._lay_out(flat)
            if held is None:
                self._refused.append(
                    flat
                )  # asking 448 counts of steps anew in each step would wait for the GPU
            else:
                self._held.append(held)
        return held

    def _let_go(self, held: _States) -> None:
        """Its parameters are torch's again, each with a count of steps of its own."""
        self._held = [other for other in self._held if other is not held]
        for p in held.flat.parameters:
            if self.state.get(p, {}).get("step") is held.step:
                self.state[p]["step"] = held.step.clone()

    def state_dict(self) -> dict[str, Any]:
        """torch's, with counts of steps that share no memory: torch would count each of them up."""
        found = super().state_dict()
        found["state"] = {key: _with_own_step(own) for key, own in found["state"].items()}
        return found

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, too, which knows no flat storage."""
        super().__setstate__(state)
        self.__dict__.setdefault("_flats", tuple)
        self.__dict__.setdefault("_refused", [])
        if not self.__dict__.setdefault("_held", []):
            for p, own in self.state.items():
                self.state[p] = _with_own_step(own)

    def _are_there(self, held: _States) -> bool:
        """Whether the states are still the parameters' own: those of a checkpoint may have been loaded, or moved."""
        for p, views in zip(held.flat.parameters, held.views, strict=True):
            own = self.state.get(p, {})
            found = own.get("exp_avg"), own.get("exp_avg_sq")
            if own.get("step") is not held.step:
                return False
            if any(
                x is None or x.data_ptr() != view.data_ptr() for x, view in zip(found, views, strict=True)
            ):
                return False
        return True

    def _lay_out(self, flat: FlatAdapters) -> _States | None:
        """Move the parameters' states side by side, beginning with zeros where there are none."""
        before = [self.state.get(p, {}) for p in flat.parameters]
        steps = {float(own["step"]) if own else 0.0 for own in before}
        if len(steps) > 1:
            return None
        exp_avg, exp_avg_sq = torch.zeros_like(flat.values), torch.zeros_like(flat.values)
        step = torch.tensor(steps.pop(), dtype=torch.float32, device=flat.values.device)
        views = tuple(zip(flat.views_of(exp_avg), flat.views_of(exp_avg_sq), strict=True))
        for p, own, (first, second) in zip(flat.parameters, before, views, strict=True):
            if own:
                first.copy_(own["exp_avg"])
                second.copy_(own["exp_avg_sq"])
            self.state[p] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        return _States(flat, exp_avg, exp_avg_sq, step, views)


def _with_own_step(own: dict[str, Any]) -> dict[str, Any]:
    return {**own, "step": own["step"].clone()} if isinstance(own.get("step"), Tensor) else own


def clip_flat_(gradient: Tensor, max_norm: float) -> Tensor:
    """The norm of a flat gradient, which is scaled down to `max_norm` where it is larger, as
    `torch.nn.utils.clip_grad_norm_` does."""
    norm = torch.linalg.vector_norm(gradient)
    gradient.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm
