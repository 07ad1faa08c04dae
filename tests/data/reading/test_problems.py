"""Kinds of problems are documented as they are, and texts of the data do nothing to a terminal."""

from __future__ import annotations

from pathlib import Path

from pronghorn.data.reading import KINDS
from pronghorn.pages import visible

ROOT = Path(__file__).resolve().parents[3]


def test_every_kind_stands_in_the_documentation():
    written = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for kind in KINDS.values():
        level = f"{kind.level}, repaired" if kind.repaired else kind.level
        assert f"| `{kind.id}` | {level} | {kind.title} | {kind.fix} |" in written
    assert written.count("\n| `") == len(KINDS)
    chinese = (ROOT / "docs" / "zh" / "data.md").read_text(encoding="utf-8")
    starts = [
        f"| `{kind.id}` | {kind.level}{', repaired' if kind.repaired else ''} |" for kind in KINDS.values()
    ]
    assert [line for line in starts if line not in chinese] == []


def test_what_is_not_seen_is_spelled_out():
    assert visible("a\nb\tc\x1b\u202e\ud800é数") == "a\\nb\\tc<U+001B><U+202E><U+D800>é数"
    assert visible("x" * 100, 10) == "x" * 10 + "…"
