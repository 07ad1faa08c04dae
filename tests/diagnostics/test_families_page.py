"""docs/families.md is what the registry of families says."""

from pathlib import Path

from pronghorn.diagnostics.families import page
from pronghorn.families import FAMILIES, STOCK

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_current() -> None:
    written = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert written == page(), (
        "pronghorn.families has changed: run python -m pronghorn.diagnostics.families --write docs/families.md"
    )


def test_every_type_is_on_it_once() -> None:
    fast = [kind for family in FAMILIES for kind in family.model_types]
    assert len(set(fast)) == len(fast) and not set(fast) & set(STOCK)
    lines = page().splitlines()
    for kind in (*fast, *STOCK):
        assert sum(f"`{kind}`" in line for line in lines if line.startswith("|")) == 1, kind


def test_what_sets_a_family_apart_is_told() -> None:
    """A function of a family's own has a docstring, which is what the page says of it."""
    for family in FAMILIES:
        for name in ("window", "rotation", "scales", "unsupported"):
            assert getattr(family, name).__doc__, f"{family.name}: {name}"
