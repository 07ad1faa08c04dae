"""Which point of the space is tried next: one of a grid, a random one, or one that Optuna's TPE proposes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from pronghorn.errors import PackageMissing, SearchInvalid, nearest
from pronghorn.experiments.search.space import Range, Settings, Space
from pronghorn.experiments.search.trial import Trial

SAMPLERS = ("grid", "random", "tpe")
#: Trials of `random` and `tpe`, where nobody says.
TRIALS = 20
#: Of TPE's trials, those at the beginning that are random.
_RANDOM_FIRST = 5
#: Finished trials before any is pruned.
_UNPRUNED = 3
#: Points that TPE may propose again before a space counts as searched.
_REPEATED = 100


def sampler_named(
    name: str, space: Space, trials: int | None, seed: int, maximize: bool, finished: Iterable[Trial]
) -> Listed | Tpe:
    """The sampler, told what is finished.

    Raises:
        SearchInvalid: there is none of this name, or a grid over a range.
        PackageMissing: `tpe` without Optuna.
    """
    if name == "grid":
        return Listed(islice(space.grid(), trials), finished)
    if name == "random":
        return Listed(islice(space.drawn(seed), trials or TRIALS), finished)
    if name == "tpe":
        return Tpe(space, trials or TRIALS, seed, maximize, finished)
    raise SearchInvalid(
        f"there is no sampler '{name}'", fix=nearest(name, SAMPLERS) or f"use one of {', '.join(SAMPLERS)}"
    )


class Listed:
    """Points in an order that results do not change; those that are finished are passed over."""

    #: whether trainings are looked at before their end
    prunes = False

    def __init__(self, points: Iterable[Settings], finished: Iterable[Trial]) -> None:
        done = [trial.settings for trial in finished]
        self._points: Iterator[Settings] = (point for point in points if point not in done)

    def next(self, number: int) -> Settings | None:
        """The settings of trial `number`, or None when there are no more."""
        return next(self._points, None)

    def should_prune(self, number: int, percent: int, loss: float) -> bool:
        """Whether a trial is not worth its end, by the held-out loss after so much of the training."""
        return False

    def told(self, trial: Trial) -> None:
        """A trial is finished."""


class Tpe:
    """Optuna's tree-structured Parzen estimator; a trial is pruned where its held-out loss is above the median of the
    others after as much of their training.

    A trial that failed counts as the worst of all, so that its neighbourhood is left.
    """

    prunes = True

    def __init__(
        self, space: Space, trials: int, seed: int, maximize: bool, finished: Iterable[Trial]
    ) -> None:
        try:
            import optuna
        except ImportError:
            raise PackageMissing(
                "the sampler tpe is Optuna's, which is not installed",
                fix="pip install 'pronghorn[search]', or take the sampler grid or random",
            ) from None
        self._optuna, self._space, self._most, self._sign = optuna, space, trials, -1 if maximize else 1
        self._lists = {key: sorted(v) for key, v in space.axes.items() if not isinstance(v, Range)}
        self._kinds = {key: self._distribution(values) for key, values in space.axes.items()}
        self._asked: dict[int, Any] = {}
        self._done: list[Trial] = []
        finished = list(finished)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Trials that run at the same time are taken for bad ones, so that proposals differ.
            sampler = optuna.samplers.TPESampler(
                seed=seed + len(finished), n_startup_trials=_RANDOM_FIRST, constant_liar=True
            )
        pruner = optuna.pruners.MedianPruner(n_startup_trials=_UNPRUNED)
        # Always minimised: of a metric that is to be high, the negative. What prunes is a loss either way.
        self._study = optuna.create_study(sampler=sampler, pruner=pruner)
        for trial in finished:
            self._add(trial)

    def _distribution(self, values: Any) -> Any:
        """A range, or the index of a value in its order, which TPE takes for a number as it should."""
        of = self._optuna.distributions
        if isinstance(values, Range):
            return of.FloatDistribution(values.low, values.high, log=True)
        return of.IntDistribution(0, len(values) - 1)

    def next(self, number: int) -> Settings | None:
        """The settings of trial `number`, or None when there are enough, or TPE knows no new ones."""
        if len(self._done) + len(self._asked) >= self._most:
            return None
        for _ in range(_REPEATED):
            asked = self._study.ask(self._kinds)
            settings = {key: self._setting(key, value) for key, value in asked.params.items()}
            known = next((trial for trial in self._done if trial.settings == settings), None)
            if known is not None:
                self._study.tell(asked, self._value(known))
            elif any(other == settings for _, other in self._asked.values()):
                self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
            else:
                self._asked[number] = (asked, settings)
                return settings
        return None

    def should_prune(self, number: int, percent: int, loss: float) -> bool:
        asked, _ = self._asked[number]
        asked.report(loss, percent)
        return bool(asked.should_prune())

    def told(self, trial: Trial) -> None:
        asked, _ = self._asked.pop(trial.number)
        self._done.append(trial)
        if trial.status == "pruned":
            self._study.tell(asked, state=self._optuna.trial.TrialState.PRUNED)
        else:
            self._study.tell(asked, self._value(trial))

    def _add(self, trial: Trial) -> None:
        """A trial of an earlier call."""
        of = self._optuna.trial
        pruned = trial.status == "pruned"
        params = {
            key: self._lists[key].index(value) if key in self._lists else value
            for key, value in trial.settings.items()
        }
        self._done.append(trial)
        self._study.add_trial(
            of.create_trial(
                state=of.TrialState.PRUNED if pruned else of.TrialState.COMPLETE,
                value=None if pruned else self._value(trial),
                params=params,
                distributions=self._kinds,
                intermediate_values=dict(trial.seen),
            )
        )

    def _setting(self, key: str, value: Any) -> Any:
        values = self._space.axes[key]
        return values.rounded(value) if isinstance(values, Range) else self._lists[key][value]

    def _value(self, trial: Trial) -> float:
        return math.inf if trial.score is None else self._sign * trial.score
