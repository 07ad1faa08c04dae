"""What the guide says can be followed: links lead somewhere, commands parse, the Chinese pages are in step."""

import re
import shlex

import pytest
import yaml

from pronghorn.cli.main import build_parser
from pronghorn.compat.names import MODULES
from pronghorn.config import parse_config
from tests.docs.pages import (
    DOCS,
    IN_CHINESE,
    ROOT,
    anchors,
    blocks,
    code_alone,
    commands,
    headings,
    links,
    marks,
    slug,
    table_rows,
)

PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md"])


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    for link in links(page):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name(page)}: {link} names no heading"


def test_a_dead_link_would_be_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Two words, `code`\n\n[a](#two-words-code) [b](gone.md) `[c](no.md)`\n\n```\n[d](no.md)\n```\n"
    )
    assert links(page) == ["#two-words-code", "gone.md"]
    assert anchors(page) == {slug("Two words, code")} == {"two-words-code"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page, capsys):
    for line, command in commands(page):
        words = shlex.split(command, comments=True)[1:]
        cut = next((i for i, word in enumerate(words) if word in ("&", "|", ">", "&&", ";")), len(words))
        try:
            build_parser().parse_args(words[:cut])
        except SystemExit:
            pytest.fail(f"{name(page)}, line {line}: {command}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_configurations_are_accepted(page):
    for block in blocks(page):
        if block.language == "yaml" and "model" in (yaml.safe_load(block.code) or {}):
            parse_config(block.code, source=f"{name(page)}, line {block.line}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_marks_stand_before_blocks(page):
    assert marks(page) == sum(block.needs is not None for block in blocks(page))


@pytest.mark.parametrize("chinese", IN_CHINESE, ids=name)
def test_chinese_pages_are_in_step(chinese):
    english = IN_CHINESE[chinese]
    assert headings(chinese) == headings(english)
    for ours, theirs in zip(blocks(chinese), blocks(english), strict=True):
        assert (ours.language, ours.needs) == (theirs.language, theirs.needs)
        if ours.language == "python":
            assert code_alone(ours.code) == code_alone(theirs.code), f"{name(chinese)}, line {ours.line}"
    assert [shlex.split(line, comments=True)[:3] for _, line in commands(chinese)] == [
        shlex.split(line, comments=True)[:3] for _, line in commands(english)
    ]
    for table in ("<!-- table:", "| --- "):
        assert chinese.read_text("utf-8").count(table) == english.read_text("utf-8").count(table)


#: English page -> why there is no Chinese one
ENGLISH_ONLY = {
    "errors.md": "errors.zh-CN.md, made of the same explanations",
    "families.md": "made of the families' code: names, types and fields",
    "lab-notes.md": "a log of trials",
}


def test_every_page_is_there_in_chinese():
    english = {page.name for page in DOCS.glob("*.md")} - {"errors.zh-CN.md"}
    assert {page.name for page in IN_CHINESE} == english - ENGLISH_ONLY.keys()
    assert ENGLISH_ONLY.keys() <= english


@pytest.mark.parametrize("chinese", IN_CHINESE, ids=name)
def test_figures_of_tables_are_the_same_in_chinese(chinese):
    """Cells of nothing but figures; words may stand in another order."""
    for ours, theirs in zip(table_rows(chinese), table_rows(IN_CHINESE[chinese]), strict=True):
        assert len(ours) == len(theirs), f"{name(chinese)}: {ours}"
        for cell, english in zip(ours, theirs, strict=True):
            if not re.search(r"[^\W\d_]", english):
                figures = re.findall(r"\d+(?:[.,]\d+)*", english)
                assert re.findall(r"\d+(?:[.,]\d+)*", cell) == figures, f"{name(chinese)}: {ours}"


def test_every_page_is_in_the_sites_menu():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [
            page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)
        ]

    menu = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(menu) == len(set(menu))
    assert set(menu) == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


@pytest.mark.parametrize("page", [DOCS / "from-unsloth.md", DOCS / "zh" / "from-unsloth.md"], ids=name)
def test_the_table_of_names_is_what_drop_in_mode_knows(page):
    text = page.read_text(encoding="utf-8")
    alike = {"__version__", "unsloth_train", "UnslothModel", "UnslothVisionDataCollator"}
    alike |= {f"Fast{family}Model" for family in ("Mistral", "Qwen2")} | {"PatchFastRL", "PatchKTOTrainer"}
    for public in MODULES["unsloth"].keys() - alike:
        assert public in text, public
