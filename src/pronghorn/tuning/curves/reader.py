"""All that a run's curves say, without what follows from something worse."""

from __future__ import annotations

from pronghorn.tuning.curves.evaluation import overfitting
from pronghorn.tuning.curves.finding import Finding
from pronghorn.tuning.curves.gradients import gradient_findings
from pronghorn.tuning.curves.history import History
from pronghorn.tuning.curves.jumps import spikes
from pronghorn.tuning.curves.levels import not_numbers, rises
from pronghorn.tuning.curves.trends import trend_findings

_ORDER = ("error", "warning", "note")


def read_curves(history: History) -> list[Finding]:
    """Findings, the worst first. A pure function of the history; a healthy run has none."""
    broken, risen = not_numbers(history), rises(history)
    found = [*broken, *risen, *spikes(history), *overfitting(history)]
    if not any(finding.lasting for finding in (*broken, *risen)):
        # Of a run that has left the rails, trends say nothing more.
        found += gradient_findings(history)
        if not risen:
            found += trend_findings(history)
    return sorted(found, key=lambda finding: (_ORDER.index(finding.level), finding.first))
