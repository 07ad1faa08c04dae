"""docs/errors.md is what errors.py and the explanations say, and every error has a code of its own."""

from pathlib import Path

import pytest

from pronghorn.diagnostics.catalogue import GROUPS, catalogue, entry_of, error_classes, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name,language", [("errors.md", "en"), ("errors.zh-CN.md", "zh")])
def test_documents_are_current(name, language):
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == catalogue(language), (
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
        assert f"### {item.code} `{item.__name__}`" in catalogue("zh")


def test_writing_makes_both_pages(tmp_path):
    pages = write(tmp_path / "errors.md")
    assert [page.name for page in pages] == ["errors.md", "errors.zh-CN.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["errors.md", "errors.zh-CN.md"]


def test_an_error_without_an_explanation_has_its_docstring():
    from pronghorn.errors import PronghornError

    class NewError(PronghornError):
        """Something new."""

        code = "PH999"

    entry = entry_of(NewError)
    assert entry.when == "Something new." and entry.cause == ""
