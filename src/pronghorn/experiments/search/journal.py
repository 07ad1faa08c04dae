"""The finished trials of a search, a line each, so that an interrupted search goes on after them.

The first line says what was searched, on which model and rows. A line is flushed to the disk when its trial is
finished; one that an interruption cut off is left out when the file is read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

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
        self.path = folder / JOURNAL
        self.trials: list[Trial] = []
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            temporary = self.path.with_name(f".{JOURNAL}.tmp")
            temporary.write_text(json.dumps(facts) + "\n", encoding="utf-8")
            os.replace(temporary, self.path)
            return
        self._read(whole, facts)
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))

    def _read(self, content: bytes, facts: dict[str, Any]) -> None:
        try:
            before, *lines = map(json.loads, content.splitlines())
            self.trials = [Trial.of(line) for line in lines]
        except (ValueError, TypeError, KeyError) as error:
            raise SearchChanged(
                f"this is no journal of a search: {error}",
                where=str(self.path),
                fix="search in another folder, or begin anew (restart)",
            ) from None
        now = json.loads(json.dumps(facts))
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                raise SearchChanged(
                    f"the trials so far are of another {name}: {_short(before.get(name))}, now "
                    f"{_short(now.get(name))}",
                    where=str(self.path),
                    fix="go on with the same, search in another folder, or begin anew (restart)",
                )

    def add(self, trial: Trial) -> None:
        """A trial is finished."""
        with self.path.open("ab") as file:
            file.write(json.dumps(trial.as_dict()).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.trials.append(trial)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
