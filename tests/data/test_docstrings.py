"""Rows from the standard library's docstrings: deterministic, clean, deduplicated, never imported."""

import textwrap

import pytest

from pronghorn.data.docstrings import DocRow, docstring_rows, split_rows
from pronghorn.errors import PackageMissing


@pytest.fixture(scope="module")
def library_rows() -> list[DocRow]:
    return docstring_rows()


def test_there_are_thousands(library_rows):
    assert len(library_rows) > 2000


def test_known_row(library_rows):
    row = next(row for row in library_rows if row.name == "os.path.join")
    assert row.question == "What does `os.path.join(a, *p)` do?"
    assert row.answer.startswith("Join two or more pathname components, inserting '/' as needed.")


def test_rows_are_clean_and_unique(library_rows):
    assert len({row.name for row in library_rows}) == len(library_rows)
    assert len({row.answer.lower() for row in library_rows}) == len(library_rows)
    for row in library_rows:
        assert row.answer.isascii()
        assert "\n" not in row.answer
        assert ">>>" not in row.answer
        assert row.answer[-1] in ".!?)"
        assert 24 <= len(row.answer) <= 361
        assert not any(part.startswith("_") for part in row.name.split("."))


def test_deterministic(library_rows):
    assert docstring_rows() == library_rows


def test_split_is_disjoint_and_independent_of_other_rows(library_rows):
    train, held = split_rows(library_rows, 100)
    assert len(held) == 100
    assert len(train) + len(held) == len(library_rows)
    assert not {row.name for row in train} & {row.name for row in held}
    assert split_rows(library_rows[::-1], 100) == (train, held)


def test_named_rows_are_always_held_back(library_rows):
    train, held = split_rows(library_rows, 10, always=("os.path.join", "no.such.thing"))
    assert held[0].name == "os.path.join"
    assert len(held) == 10
    assert "os.path.join" not in {row.name for row in train}


def write(folder, name, source):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source))


def test_what_is_taken_from_a_source_file(tmp_path):
    write(
        tmp_path,
        "shapes.py",
        '''
        raise SystemExit("this file must never be run")

        def area(width: float, height: float = 1.0, *, unit="cm") -> float:
            """Return the area
            of a rectangle

            More words that are left out.
            """

        def signature_first(x):
            """signature_first(x) -> y

            Turn the given x into something like y.
            """

        def same(width):
            """Return the area of a rectangle."""

        def announces():
            """These are the following things that it does:

            - one
            """

        def _private():
            """Nobody should ever ask about this function."""

        class Circle:
            """A round thing that has a radius and a centre."""

            def grow(self, by):
                """Make the radius larger by the given amount."""

            @staticmethod
            def unit(radius):
                """Return the unit circle for the given radius."""
        ''',
    )
    write(tmp_path, "test/hidden.py", 'def f():\n    """A test helper that nobody asks about."""\n')
    write(tmp_path, "broken.py", "def (:\n")
    rows = {row.name: row for row in docstring_rows(tmp_path)}
    assert set(rows) == {
        "shapes.Circle",
        "shapes.Circle.grow",
        "shapes.Circle.unit",
        "shapes.area",
        "shapes.signature_first",
    }
    assert rows["shapes.area"].question == "What does `shapes.area(width, height=1.0, *, unit='cm')` do?"
    assert rows["shapes.area"].answer == "Return the area of a rectangle."
    assert rows["shapes.signature_first"].answer == "Turn the given x into something like y."
    assert rows["shapes.Circle"].question == "What is the class `shapes.Circle` for?"
    assert "grow(by)" in rows["shapes.Circle.grow"].question
    assert "unit(radius)" in rows["shapes.Circle.unit"].question


def test_messages_alternate():
    assert DocRow("n", "q", "a").messages() == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]


def test_no_sources(tmp_path):
    with pytest.raises(PackageMissing, match="source files"):
        docstring_rows(tmp_path)
