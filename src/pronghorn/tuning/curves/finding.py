"""Kinds of findings: a stable id each, how bad it is, whether a run is worth going on with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["error", "warning", "note"]
#: the curve that shows it, as a log names it; "eval_loss" is any loss on held-out rows; "" none
CurveName = Literal["loss", "eval_loss", "grad_norm", ""]


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Args:
        curve: where it is seen.
        hopeless: further steps make the model no better, so that `stop_early` ends the run.
    """

    id: str
    level: Level
    curve: CurveName
    hopeless: bool = False


KINDS: dict[str, Kind] = {
    kind.id: kind
    for kind in (
        Kind("not-a-number", "error", "loss", hopeless=True),
        Kind("rate-too-large", "error", "loss", hopeless=True),
        Kind("divergence", "error", "loss", hopeless=True),
        Kind("setback", "warning", "loss"),
        Kind("overfitting", "warning", "eval_loss", hopeless=True),
        Kind("spike", "warning", "loss"),
        Kind("spike-rows", "warning", ""),
        Kind("oscillation", "warning", "loss"),
        Kind("gradient-spike", "warning", "grad_norm"),
        Kind("gradient-growth", "warning", "grad_norm"),
        Kind("gradient-zero", "error", "grad_norm"),
        Kind("clipping", "note", "grad_norm"),
        Kind("plateau", "note", "loss"),
        Kind("rate-too-small", "warning", "loss"),
    )
}


@dataclass(frozen=True)
class Finding:
    """Something that curves show.

    Args:
        kind: a key of `KINDS`.
        first, last: the optimizer steps it is about.
        what: a sentence with numbers.
        advice: what to do about it.
        rows: rows of the data as given that were in these steps.
        best_step: of overfitting, the step whose weights are the best.
        lasting: it was still so at the last step that is known.
    """

    kind: str
    first: int
    last: int
    what: str
    advice: str
    rows: tuple[int, ...] = ()
    best_step: int | None = None
    lasting: bool = True

    @property
    def level(self) -> Level:
        return KINDS[self.kind].level

    @property
    def hopeless(self) -> bool:
        """Whether further steps are wasted."""
        return KINDS[self.kind].hopeless and self.lasting

    def __str__(self) -> str:
        return f"{self.what} {self.advice}"

    def as_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "rows": list(self.rows),
            "level": self.level,
            "curve": KINDS[self.kind].curve,
        }
