"""Predictions against the committed runs: whoever makes them worse sees it here."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from benchmarks.plan_error import END, START, rows, table

DOCS = Path(__file__).parents[2] / "docs"


def test_predictions_stay_close_to_what_was_measured() -> None:
    found = list(rows())
    ours = [row for row in found if row.side.startswith("pronghorn")]
    assert len(ours) >= 30 and len(found) - len(ours) >= 6
    assert statistics.median(abs(row.memory_error) for row in ours) < 0.03
    assert max(abs(row.memory_error) for row in found) < 0.10
    times = [abs(row.time_error) for row in found if row.time_error is not None]
    assert len(times) >= 14 and statistics.median(times) < 0.035 and max(times) < 0.08


@pytest.mark.parametrize("page", [DOCS / "planning.md", DOCS / "zh" / "planning.md"], ids=str)
def test_the_page_shows_the_table_of_now(page: Path) -> None:
    """After a change: python -m benchmarks.plan_error --write docs/planning.md"""
    text = page.read_text(encoding="utf-8")
    assert text.partition(START)[2].partition(END)[0].strip() == table(list(rows()))
