"""What is finished of a long piece of work, a line of JSON each, so that it goes on there after an interruption.

The first line says what the work is; it goes on only with the same. A line is flushed to the disk when its piece is
finished; one that an interruption cut off is left out when the file is read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class OfAnotherWork(ValueError):
    """The file is of another piece of work: fact `name` was `before` and is `now`."""

    def __init__(self, name: str, before: Any, now: Any) -> None:
        super().__init__(name)
        self.name, self.before, self.now = name, before, now


class LineJournal:
    """The finished pieces in a file.

    Args:
        facts: what the work is, of JSON's types.

    Attributes:
        lines: what was finished before, in order.

    Raises:
        OfAnotherWork: the file is there with other facts.
        ValueError: the file is none of these.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.lines: list[Any] = []
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(json.dumps(facts) + "\n", encoding="utf-8")
            os.replace(temporary, path)
            return
        before, *self.lines = map(json.loads, whole.splitlines())
        now = json.loads(json.dumps(facts))
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                raise OfAnotherWork(name, before.get(name), now.get(name))
        if len(whole) < len(content):
            os.truncate(path, len(whole))

    def add(self, line: Any) -> None:
        """A piece is finished."""
        with self.path.open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n")
            file.flush()
            os.fsync(file.fileno())


def short(value: Any, most: int) -> str:
    """A fact in JSON, of at most so many characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else text[: most - 3] + "..."
