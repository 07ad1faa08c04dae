"""Tables of figures in the guide say what they come from: results here, the code, or a measurement that is told."""

from __future__ import annotations

import json

import pytest

from benchmarks import embedding, lr_finder
from pronghorn.blocks.levels import LEVELS, LayerWidths, kept_bytes_per_token, parks
from pronghorn.memory.gpus import GPUS
from tests.docs.pages import DOCS, IN_CHINESE, ROOT, tables

RESULTS = ROOT / "benchmarks" / "results"
#: (page, header's cells) -> what holds its figures. A table with figures that is not here is one nobody vouches for.
HELD_BY = {
    ("architecture.md", "level"): "test_bytes_of_the_levels, tests/blocks/test_levels.py",
    ("embeddings.md", "pooling"): "test_embedding_figures_are_those_of_the_results",
    ("export.md", "form"): "tests/export/test_docs.py",
    ("memory.md", "level"): "test_bytes_of_the_levels",
    ("planning.md", "class"): "test_shares_of_the_h200",
    ("planning.md", "GPU"): "test_gpus_are_those_of_the_planner",
    ("planning.md", ""): "tests/benchmarks/test_plan_error.py",
    ("planning.md", "run"): "tests/benchmarks/test_plan_error.py",
    ("quantisation.md", ""): "the page says how to measure it anew: benchmarks.quantisation",
    ("search.md", "rate"): "the page has its command",
    ("settings.md", "`learning_rate`"): "tests/benchmarks/test_settings.py",
    ("settings.md", "rows × accumulation"): "tests/benchmarks/test_settings.py",
    ("settings.md", "`max_length`"): "tests/benchmarks/test_settings.py",
    ("settings.md", "`r`"): "tests/benchmarks/test_settings.py",
    ("settings.md", "`packing`"): "tests/benchmarks/test_settings.py",
    ("tuning.md", "data"): "test_rates_are_those_of_the_results",
}
#: Rules and choices, whose figures are arguments and limits, not measurements.
REFERENCE = {
    ("methods.md", ""),
    ("search.md", "setting"),
    ("settings.md", "setting"),
    ("tuning.md", "setting"),
}
PAGES = [
    page
    for page in sorted(DOCS.glob("*.md"))
    if not page.name.startswith(("errors", "lab-notes", "families"))
]


def has_figures(rows: list[list[str]]) -> bool:
    """Whether two cells or more, the first of each row aside, begin with a number."""
    cells = [cell.strip("*`+-") for row in rows[2:] for cell in row[1:]]
    return sum(cell[:1].isdigit() for cell in cells) > 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_of_figures_are_held_by_something(page):
    for rows in tables(page):
        key = (page.name, rows[0][0])
        assert not has_figures(rows) or key in HELD_BY or key in REFERENCE, f"{page.name}: {rows[0]}"


def both(name):
    chinese = {english: ours for ours, english in IN_CHINESE.items()}
    return [page.read_text(encoding="utf-8") for page in (DOCS / name, chinese[DOCS / name])]


def test_embedding_figures_are_those_of_the_results():
    (found,) = RESULTS.glob("*-embedding.json")
    for row in embedding.table(json.loads(found.read_text())).splitlines()[2:]:
        assert row in (DOCS / "embeddings.md").read_text(encoding="utf-8")


def test_rates_are_those_of_the_results():
    rows = {
        row
        for found in RESULTS.glob("*-lr-finder*.json")
        for row in lr_finder.table(json.loads(found.read_text())).splitlines()
    }
    for text in both("tuning.md"):
        shown = [
            line
            for line in text.splitlines()
            if line.startswith(("| docstrings", "| sources", "| characters"))
        ]
        assert len(shown) >= 3 and set(shown) <= rows


def test_bytes_of_the_levels():
    widths = LayerWidths(4096, 4096, 1024, 32, 14336, 4 * 16, 3 * 16, 2, 2)
    for name in ("memory.md", "architecture.md"):
        for text in both(name):
            for level in LEVELS:
                if not parks(level):
                    assert f"{kept_bytes_per_token(level, widths):,}" in text, f"{name}: {level}"


def test_gpus_are_those_of_the_planner():
    for text in both("planning.md"):
        for gpu in GPUS:
            rates = " | ".join(f"{rate:g}" for rate in (gpu.bf16, gpu.fp16, gpu.fp8, gpu.int8))
            start = f"| {gpu.name} | {gpu.memory:g} | {gpu.bandwidth:,} | {rates} | {gpu.source} |"
            assert start in text, start


def test_shares_of_the_h200():
    shares = next(gpu.shares for gpu in GPUS if gpu.name == "H200")
    text, chinese = both("planning.md")
    percent = [
        f"{share * 100:.0f} %" for share in (shares.matmul, shares.int8, shares.fp8, *shares.attention)
    ]
    for figure in percent:
        assert f"| {figure}" in text or (figure in text and figure in chinese)
    assert f"| {shares.bandwidth * 100:.0f} % |" in text
