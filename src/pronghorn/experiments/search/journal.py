"""The finished trials of a search, so that an interrupted search goes on after them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pronghorn.data.journal import LineJournal, OfAnotherWork, short
from pronghorn.errors import SearchChanged
from pronghorn.experiments.search.trial import Trial

JOURNAL = "trials.jsonl"


class Journal:
    """The trials in a search's folder.

    Args:
        facts: of the space, the model, the rows and the settings; a search goes on only with the same.

    Raises:
        SearchChanged: the journal is of another search, or is none.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        path = folder / JOURNAL
        try:
            self._lines = LineJournal(path, facts)
            self.trials = [Trial.of(line) for line in self._lines.lines]
        except OfAnotherWork as other:
            raise SearchChanged(
                f"the trials so far are of another {other.name}: {short(other.before, 80)}, now {short(other.now, 80)}",
                where=str(path),
                fix="go on with the same, search in another folder, or begin anew (restart)",
            ) from None
        except (ValueError, TypeError, KeyError) as error:
            raise SearchChanged(
                f"this is no journal of a search: {error}",
                where=str(path),
                fix="search in another folder, or begin anew (restart)",
            ) from None

    def add(self, trial: Trial) -> None:
        """A trial is finished."""
        self._lines.add(trial.as_dict())
        self.trials.append(trial)
