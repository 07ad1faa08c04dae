"""What is finished of a run, in a file beside its output: a line each, so that an interrupted run goes on after it.

The first line says of which documents and settings the rows are. Each further line is one finished group of chunks. It
is written at once and flushed to the disk; a line that an interruption cut off is left out when the file is read.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        self.groups: list[Group] = []
        if restart or not self.path.exists():
            self._begin(facts)
        else:
            self._read(facts)

    def _begin(self, facts: dict[str, Any]) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps(facts, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)

    def _read(self, facts: dict[str, Any]) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines:
            self._begin(facts)
            return
        self._check(json.loads(lines[0]), facts)
        for line in lines[1:]:
            group = json.loads(line)
            self.groups.append(Group(group["rows"], Counter(group["rejected"])))
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))

    def _check(self, before: dict[str, Any], facts: dict[str, Any]) -> None:
        now = json.loads(json.dumps(facts))
        differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if differing:
            key = differing[0]
            raise SynthesisChanged(
                f"the rows made so far are of other {key}: {_short(before.get(key))}, now {_short(now.get(key))}",
                where=str(self.path),
                fix="go on with the same documents and settings, name another output, or begin anew with --restart",
            )

    def add(self, group: Group) -> None:
        """A group is finished."""
        line = json.dumps({"rows": group.rows, "rejected": group.rejected}, ensure_ascii=False)
        with self.path.open("ab") as file:
            file.write(line.encode("utf-8") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.groups.append(group)

    def remove(self) -> None:
        """The output is written; nothing is left to go on with."""
        self.path.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
