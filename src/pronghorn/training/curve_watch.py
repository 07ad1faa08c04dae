"""Reads a run's curves while it trains: says what they show, once, and ends a run that has nothing more to gain."""

from __future__ import annotations

import logging
from typing import Any

from transformers.trainer_callback import TrainerCallback

from pronghorn.tuning.curves import Curve, Finding, History, outstanding_steps, read_curves
from pronghorn.tuning.run_record import evaluation_keys

logger = logging.getLogger("pronghorn")

#: New steps after which curves are read again: a tenth of those there are, so that all readings of a run together cost
#: about ten times the last one, and at least this many. Counted, not timed: all processes read at the same steps.
_READ_AGAIN, _AT_LEAST = 0.1, 20
#: Points of a curve that is read; of a longer run they are averages.
MOST_POINTS = 20_000
#: Steps of one finding whose rows are kept.
_STEPS_WITH_ROWS = 64
#: Kinds that may be said several times, for other steps each time.
_SINGLE = ("spike", "gradient-spike")


class CurveWatch(TrainerCallback):
    """Watches one trainer's curves."""

    takes_late_logs = True

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._said: set[tuple[str, int]] = set()
        self._read_at = 0
        #: rows of the steps that a finding asks about, or may ask about yet, by step
        self.rows: dict[int, list[int]] = {}
        #: what ended the run, where it was ended
        self.ended_by: Finding | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._said, self._read_at, self.rows, self.ended_by = set(), 0, {}, None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not self._trainer.is_in_train:  # an evaluation before or after
            return
        evaluated = bool(evaluation_keys([logs or {}]))
        known = len(self._trainer._ledger.steps)
        if not evaluated and known - self._read_at < max(_AT_LEAST, _READ_AGAIN * known):
            return
        self._read_at = known
        found = self.findings(over=False)
        for finding in found:
            self._say_once(finding)
        hopeless = next((finding for finding in found if finding.hopeless), None)
        if args.stop_early and hopeless is not None and not control.should_training_stop:
            self.ended_by, control.should_training_stop = hopeless, True
            self._say(f"stopped at step {state.global_step}: {hopeless.kind} (stop_early)", "warning")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for finding in self.findings(over=True):
            self._say_once(finding)

    def findings(self, *, over: bool) -> list[Finding]:
        """What the curves show by now."""
        trainer = self._trainer
        ledger = trainer._ledger
        steps, losses, norms = ledger.averaged(MOST_POINTS)
        remembered = ledger.rows()
        history = History.of_log(
            trainer.state.log_history,
            step_loss=Curve.of(zip(steps, losses, strict=True)),
            step_norm=Curve.of(zip(steps, norms, strict=True)),
            max_steps=trainer.state.max_steps,
            max_grad_norm=float(trainer.args.max_grad_norm or 0.0),
            rows={**self.rows, **remembered},
            over=over,
        )
        found = read_curves(history)
        asked = set(outstanding_steps(history))
        for finding in found:
            if finding.rows and finding.kind != "spike-rows":  # whose steps are spikes, or stand out
                asked.update(range(finding.first, min(finding.last + 1, finding.first + _STEPS_WITH_ROWS)))
        self.rows |= {step: list(remembered[step]) for step in sorted(asked & remembered.keys())}
        return found

    def _say_once(self, finding: Finding) -> None:
        key = (finding.kind, finding.first if finding.kind in _SINGLE else 0)
        if key in self._said:
            return
        self._said.add(key)
        # The number watch has said more about that already.
        if finding.kind != "not-a-number" or not self._trainer._numbers.told:
            self._say(f"{finding.kind}: {finding}", finding.level)

    def _say(self, text: str, level: str) -> None:
        trainer = self._trainer
        if not trainer.state.is_world_process_zero:
            return
        if trainer._progress is not None:
            trainer._progress.say(text, level)
        else:
            logger.warning("pronghorn: %s", text)
