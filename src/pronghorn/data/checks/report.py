"""What a check found."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pronghorn.data.reading import KINDS, Finding, Level, Problem, level_of


@dataclass
class FileFacts:
    """One file: what it is, and how long its rows are."""

    name: str
    size: int
    container: str
    encoding: str = "utf-8"
    format: str | None = None
    rows: int = 0
    """Rows that could be read."""
    unread: int = 0
    """Rows that could not."""
    bad_rows: int = 0
    """Rows with at least one error, those that could not be read among them."""
    characters: array[int] = field(default_factory=lambda: array("Q"))
    """Of the text of each row that could be read."""
    tokens: array[int] = field(default_factory=lambda: array("Q"))
    supervised: array[int] = field(default_factory=lambda: array("Q"))
    kept: array[int] = field(default_factory=lambda: array("Q"))
    """Tokens that count and survive truncation; these three with a tokenizer only, of rows without errors."""
    samples: list[tuple[int, list[tuple[str, str]]]] = field(default_factory=list)
    """The first rows: (line or row, texts by field)."""

    def as_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "file": self.name, "bytes": self.size, "container": self.container, "encoding": self.encoding,
            "format": self.format, "rows": self.rows + self.unread, "rows_with_errors": self.bad_rows,
            "characters": sum(self.characters),
        }  # fmt: skip
        if self.tokens:
            facts |= {
                "tokens": sum(self.tokens),
                "longest_row_tokens": max(self.tokens),
                "supervised_tokens": sum(self.supervised),
                "supervised_tokens_lost": sum(self.supervised) - sum(self.kept),
            }
        return facts


@dataclass
class Report:
    """The result of `check`.

    Args:
        findings: problems with their places, file by file; of each kind at most the number that was asked for.
        counts: all of them, by kind.
        notes: what was not looked at, and why.
    """

    files: list[FileFacts] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    levels: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    max_seq_length: int | None = None
    limit: int | None = None

    @property
    def clean(self) -> bool:
        """Whether there is neither an error nor a warning."""
        return not self.counts

    @property
    def measured(self) -> bool:
        """Whether tokens were counted."""
        return any(file.tokens for file in self.files)

    @property
    def errors(self) -> int:
        return self.levels["error"]

    @property
    def warnings(self) -> int:
        return self.levels["warning"]

    def add(self, problem: Problem, file: str, line: int, row: int, sample: str = "") -> None:
        kind, level = KINDS[problem.kind], level_of(problem)
        self.levels[level] += 1
        self.counts[problem.kind] += 1
        if self.limit is None or self.counts[problem.kind] <= self.limit:
            self.findings.append(
                Finding(problem.kind, level, file, line, row, problem.field, problem.what, kind.fix, sample)
            )

    def kinds(self) -> list[tuple[str, Level, int]]:
        """(kind, level, count), errors first, the most frequent first."""
        found = [(kind, KINDS[kind].level, count) for kind, count in self.counts.items()]
        return sorted(found, key=lambda item: (item[1] != "error", -item[2], item[0]))

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {
            "clean": self.clean,
            "errors": self.errors,
            "warnings": self.warnings,
            "files": [file.as_dict() for file in self.files],
            "counts": dict(self.counts),
            "findings": [finding.as_dict() for finding in self.findings],
            "notes": self.notes,
        }

    def write_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that needs nothing but itself; returns its path.

        Raises:
            CommandMisused: it cannot be written.
        """
        from pronghorn.data.checks.page import write_check

        return write_check(self, Path(path).expanduser())
