"""Tables of measured settings: complete or left out, and in the pages as the results have them."""

import pytest

from benchmarks import settings
from benchmarks.settings import COLUMNS, FIELDS, PAGES, TABLES, Cell


def row(table, cell, **values):
    return dict.fromkeys(FIELDS, "1") | {"table": table, "cell": cell} | values


def rows_of(table):
    return [row(table, cell.name, held_after=f"{i}.25") for i, cell in enumerate(TABLES[table])]


def test_columns_are_fields():
    assert COLUMNS.keys() == TABLES.keys()
    for columns in COLUMNS.values():
        assert {field for field, *_ in columns} <= set(FIELDS)


def test_batches_are_equal_in_the_whole():
    assert {cell.rows_per_batch * cell.accumulation for cell in TABLES["batch"]} == {8}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_table_without_all_of_its_cells_is_left_out(language):
    rows = rows_of("rank")
    assert settings.table_of("rank", rows[1:], language) is None
    lines = settings.table_of("rank", rows, language).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == [f"| {cell.name}" for cell in TABLES["rank"]]
    assert "0.250" in lines[2] and "1.000" in lines[-1]  # the loss after training, and before


def test_pages_change_between_the_marks_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table: rank -->\nold\n<!-- end of table -->\nafter\n<!-- table: length -->\n"
    )
    assert settings.write(page, rows_of("rank"), "en") == ["rank"]
    text = page.read_text()
    assert text.startswith("before\n<!-- table: rank -->\n\n| `r` |") and "old" not in text
    assert text.endswith("<!-- end of table -->\nafter\n<!-- table: length -->\n")


def test_the_same_training_is_measured_once():
    measured = {("learning-rate", "1e-03"): row("learning-rate", "1e-03", held_after="3.1")}
    assert settings.same_run(Cell("16"), measured)["held_after"] == "3.1"
    assert settings.same_run(Cell("16", rank=8), measured) is None


@pytest.mark.parametrize("language", PAGES)
def test_pages_have_what_the_results_have(language, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGES[language].read_text(encoding="utf-8"), encoding="utf-8")
    settings.write(page, settings.read(settings.RESULTS), language)
    assert page.read_text(encoding="utf-8") == PAGES[language].read_text(encoding="utf-8")
