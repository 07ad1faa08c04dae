"""Pages and charts: nothing of another's text acts in them, and what is drawn is what was given."""

from __future__ import annotations

import base64
import hashlib
import math
import re

import pytest

from pronghorn.pages import document, duration, lines, shown, table, tiles, write_whole
from pronghorn.pages.chart import CHART_SCRIPT, Mark, Series, chart, smoothed, thinned

EVIL = "</script><script>window.evil = 1</script><img src=x onerror='window.evil = 1'>\"\u202e"


def coordinates(figure: str, number: int = 0) -> list[tuple[float, float]]:
    drawn = re.findall(r'<polyline[^>]* points="([^"]*)"', figure)[number]
    return [tuple(map(float, pair.split(","))) for pair in drawn.split()]


def values(figure: str) -> list[tuple[float, float]]:
    return [
        tuple(map(float, pair.split(","))) for pair in re.findall(r'data-points="([^"]*)"', figure)[0].split()
    ]


def test_only_the_pages_own_script_may_run():
    page = document(
        EVIL, [tiles([(EVIL, EVIL)]), table([shown(EVIL, 99)], [[lines(EVIL)]])], script=CHART_SCRIPT
    )
    allowed = re.search(r"script-src 'sha256-([^']+)'", page)
    assert allowed is not None
    script = re.search(r"<script>(.*?)</script>", page, re.S)
    assert script is not None
    assert base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode() == allowed[1]
    assert page.count("<script") == 1 and "<img" not in page and "\u202e" not in page
    assert "script-src" not in document("t", []) and "default-src 'none'" in document("t", [])


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "page.html"
    write_whole("one", path)
    write_whole("two", path)
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_whole("three", tmp_path / "folder")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "page.html"]


def test_a_curve_is_where_its_values_are():
    figure = chart("Loss", [Series("loss", [(0, 4.0), (50, 3.0), (100, 2.0)])])
    (x0, y0), (x1, y1), (x2, y2) = coordinates(figure)
    assert (x0, x1, x2) == (0, 500, 1000) and y0 < y1 < y2 and y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert values(figure) == [(0, 4.0), (50, 3.0), (100, 2.0)]
    labels = [float(text) for text in re.findall(r'class="y"[^>]*>([\d.]+)<', figure)]
    assert labels == [2.0, 2.5, 3.0, 3.5, 4.0]


def test_wide_spans_are_logarithmic():
    figure = chart("Norm", [Series("norm", [(0, 0.01), (1, 1.0), (2, 100.0)])])
    heights = [y for _, y in coordinates(figure)]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


def test_what_is_no_number_leaves_a_gap():
    figure = chart(
        "Loss", [Series("loss", [(1, 2.0), (2, 1.9), (3, math.nan), (4, math.inf), (5, 1.8), (6, 1.7)])]
    )
    assert "nan" not in figure and "inf" not in figure
    assert [len(coordinates(figure, number)) for number in (0, 1)] == [2, 2]
    assert chart("Loss", [Series("loss", [(1, math.nan)])]) == "" and chart("Loss", []) == ""
    assert "points" in chart("Loss", [Series("loss", [(1, 0.0)])])


def test_many_points_are_thinned_without_losing_a_peak():
    points = [(float(step), 1.0) for step in range(50_000)]
    points[31_234] = (31_234.0, 9.0)
    points[41_234] = (41_234.0, 0.1)
    kept = thinned(points)
    assert len(kept) < 1000 and points[31_234] in kept and points[41_234] in kept
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert len(chart("Loss", [Series("loss", points)])) < 60_000


def test_smoothing_takes_medians():
    points = [(float(step), 2.0 if step != 30 else 50.0) for step in range(100)]
    assert max(y for _, y in smoothed(points)) == 2.0
    assert smoothed(points[:5]) == points[:5]
    assert math.isnan(smoothed([(float(step), math.nan) for step in range(100)])[0][1])


def test_marks_limits_and_texts():
    marks = [Mark(10, 20, "error", "1"), Mark(15, 15, EVIL, EVIL)]
    figure = chart(
        EVIL, [Series(EVIL, [(0, 1.0), (100, 2.0)]), Series("b", [(0, 1.5)])], marks=marks, limit=(3.0, EVIL)
    )
    assert 'class="band"' in figure and 'class="mark"' in figure and 'class="limit"' in figure
    assert "<script" not in figure and "<img" not in figure
    assert 'class="band" style="fill:var(--error)" x="100.0" width="100.0"' in figure


@pytest.mark.parametrize(
    "seconds,text", [(8.14, "8.1 s"), (200, "3 min 20 s"), (59.99, "60.0 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
