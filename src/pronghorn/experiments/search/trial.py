"""What came of one setting, and which settings nothing beats."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pronghorn.experiments.search.space import Settings

Status = Literal["done", "pruned", "failed"]


@dataclass(frozen=True)
class Trial:
    """One training.

    Args:
        reason: why it was pruned or failed.
        score: what the search looks for; the held-out loss unless a metric was given.
        loss: of the held-out rows after training, per supervised token.
        seconds: of training, evaluations left out.
        memory: most bytes meanwhile: reserved on a GPU, the process's own without one; None where it is not known.
        tokens_per_second: the median over the training, without padding.
        seen: (per cent of the training, held-out loss then), where somebody looked.
    """

    number: int
    settings: Settings
    status: Status
    reason: str = ""
    score: float | None = None
    loss: float | None = None
    seconds: float = 0.0
    steps: int = 0
    memory: int | None = None
    tokens_per_second: float | None = None
    seen: tuple[tuple[int, float], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Trial:
        return cls(**{**values, "seen": tuple((percent, loss) for percent, loss in values["seen"])})


def ranked(trials: Iterable[Trial], maximize: bool) -> list[Trial]:
    """The finished ones from the best score on, then the others."""

    def key(trial: Trial) -> tuple[bool, float, int]:
        score = trial.score if trial.status == "done" and trial.score is not None else None
        return score is None, (-score if maximize else score) if score is not None else 0.0, trial.number

    return sorted(trials, key=key)


def pareto(trials: Sequence[Trial], maximize: bool) -> set[int]:
    """Numbers of the trials that no other is at least as good as in score, time and memory, and better in one."""
    done = [trial for trial in trials if trial.status == "done" and trial.score is not None]
    costs = {trial.number: _costs(trial, maximize) for trial in done}
    return {
        number
        for number, own in costs.items()
        if not any(
            other != own and all(theirs <= mine for theirs, mine in zip(other, own, strict=True))
            for other in costs.values()
        )
    }


def _costs(trial: Trial, maximize: bool) -> tuple[float, float, int]:
    assert trial.score is not None
    return -trial.score if maximize else trial.score, trial.seconds, trial.memory or 0
