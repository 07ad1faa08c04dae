"""The finished groups of chunks, in a file beside a run's output, so that an interrupted run goes on after them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pronghorn.data.journal import LineJournal, OfAnotherWork, short
from pronghorn.errors import SynthesisChanged


@dataclass
class Group:
    """A finished group of chunks: its rows, and what was rejected of it, by reason."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)


class Journal:
    """The finished groups of one output.

    Args:
        facts: of the documents and settings; a run goes on only with the same.

    Raises:
        SynthesisChanged: the journal is of other documents or settings.
    """

    def __init__(self, output: Path, facts: dict[str, Any], restart: bool = False) -> None:
        self.path = output.with_name(output.name + ".progress")
        if restart:
            self.remove()
        try:
            self._lines = LineJournal(self.path, dict(sorted(facts.items())))
        except OfAnotherWork as other:
            before, now = short(other.before, 60), short(other.now, 60)
            raise SynthesisChanged(
                f"the rows made so far are of other {other.name}: {before}, now {now}",
                where=str(self.path),
                fix="go on with the same documents and settings, name another output, or begin anew with --restart",
            ) from None
        self.groups = [Group(line["rows"], Counter(line["rejected"])) for line in self._lines.lines]

    def add(self, group: Group) -> None:
        """A group is finished."""
        self._lines.add({"rows": group.rows, "rejected": group.rejected})
        self.groups.append(group)

    def remove(self) -> None:
        """The output is written; nothing is left to go on with."""
        self.path.unlink(missing_ok=True)
