"""docs/errors.md is what errors.py says, and every error has a code of its own."""

from pathlib import Path

from pronghorn.diagnostics.catalogue import GROUPS, catalogue, error_classes

ROOT = Path(__file__).resolve().parents[2]


def test_document_is_current():
    written = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert written == catalogue(), (
        "errors.py has changed: run python -m pronghorn.diagnostics.catalogue --write docs/errors.md"
    )


def test_codes_are_distinct_and_in_a_known_group():
    codes = [item.code for item in error_classes()]
    assert len(set(codes)) == len(codes)
    for code in codes:
        assert len(code) == 5
        assert code.startswith("PH")
        assert code[2] in GROUPS


def test_every_error_says_when_it_occurs():
    for item in error_classes():
        assert item.__doc__
        assert f"| {item.code} | `{item.__name__}` | " in catalogue()
