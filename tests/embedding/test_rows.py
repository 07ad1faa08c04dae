"""Rows of pairs out of files and memory; what is wrong with them is named with its file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pronghorn.embedding.rows import Pair, as_pairs, docstring_pairs, hold_back, read_pairs, read_texts
from pronghorn.errors import CommandMisused, PronghornError, RowInvalid, RowsUnreadable


def write(path: Path, *rows: object) -> Path:
    path.write_text(
        "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8"
    )
    return path


def test_every_shape_of_rows(tmp_path: Path) -> None:
    file = write(
        tmp_path / "rows.jsonl",
        {"anchor": "a", "positive": "p", "negative": "n", "id": 7},
        {"query": "q", "document": "d", "negatives": ["m", "n"]},
        "",
        {"sentence1": "s", "sentence2": "t", "negative_1": "x", "negative_2": "y", "negative_3": None},
    )
    assert read_pairs(file) == [
        Pair("a", "p", ("n",)),
        Pair("q", "d", ("m", "n")),
        Pair("s", "t", ("x", "y")),
    ]
    scored = write(tmp_path / "scored.jsonl", {"sentence1": "s", "sentence2": "t", "score": 1})
    assert read_pairs([scored, scored]) == [Pair("s", "t", score=1.0)] * 2
    table = write(tmp_path / "rows.csv", "sentence1,sentence2,score", "a,b,0.25", '"c, d",e,1')
    assert [pair.score for pair in read_pairs(table)] == [0.25, 1.0]
    # A table has no null: an empty cell is no negative.
    table = write(tmp_path / "negatives.csv", "anchor,positive,negative", "a,b,", "c,d,e")
    assert [pair.negatives for pair in read_pairs(table)] == [(), ("e",)]


@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        ({"anchor": "a"}, RowInvalid, "'positive' is missing"),
        ({"anchor": "a", "positive": " "}, RowInvalid, "'positive' is empty"),
        ({"anchor": 3, "positive": "b"}, RowInvalid, "'anchor' is a int"),
        ({"text": "a"}, RowInvalid, r"no text to embed \(columns: text\)"),
        ({"anchor": "a", "positive": "b", "score": "high"}, RowInvalid, "'high', which is no number"),
        ({"anchor": "a", "positive": "b", "negative": [""]}, RowInvalid, "'negative' is empty"),
        ([1, 2], RowInvalid, "no object"),
        ('{"anchor": "a", "pos', RowsUnreadable, "cannot be read"),
    ],
)
def test_a_bad_row_is_named_with_its_line(
    tmp_path: Path, bad: object, error: type[PronghornError], says: str
) -> None:
    file = write(tmp_path / "rows.jsonl", {"anchor": "a", "positive": "b"}, bad)
    with pytest.raises(error, match=says) as caught:
        read_pairs(file)
    assert caught.value.where == f"{file}, line 2"
    if not isinstance(bad, str):
        with pytest.raises(RowInvalid) as caught:
            as_pairs([bad])
        assert caught.value.where == "row 0 of the train data"


def test_rows_with_and_without_scores_do_not_mix() -> None:
    with pytest.raises(RowInvalid, match="row 1 has no score and the rows before it have one"):
        as_pairs([{"sentence1": "a", "sentence2": "b", "score": 1}, {"sentence1": "a", "sentence2": "b"}])
    with pytest.raises(RowsUnreadable, match="no rows"):
        as_pairs([])


def test_held_back_rows_share_no_text_with_the_others() -> None:
    pairs = [Pair(f"a{i // 2}", f"p{i}") for i in range(20)]
    train, held = hold_back(pairs, 4, seed=0)
    assert len(held) == 4 and hold_back(pairs, 4, seed=0) == (train, held)
    assert not {p.anchor for p in train} & {p.anchor for p in held}
    assert hold_back(pairs, 0, seed=0) == (pairs, [])
    with pytest.raises(CommandMisused, match="none of 20 is left"):
        hold_back(pairs, 20, seed=0)


def test_docstrings_are_pairs_of_signature_and_text(tmp_path: Path) -> None:
    (tmp_path / "folding.py").write_text(
        'class Sheet:\n    """A sheet of paper that can be folded."""\n\n'
        'def fold(text, width=70):\n    """Fold the text into lines of a width."""\n'
    )
    assert docstring_pairs(tmp_path) == [
        Pair("folding.Sheet", "A sheet of paper that can be folded."),
        Pair("folding.fold(text, width=70)", "Fold the text into lines of a width."),
    ]


def test_texts_of_files(tmp_path: Path) -> None:
    assert read_texts(write(tmp_path / "a.txt", "one", "", "two")) == ["one", "two"]
    file = write(tmp_path / "b.jsonl", {"body": "one"}, {"text": "two"})
    with pytest.raises(RowInvalid, match=r"no text in 'body' \(columns: text\)") as caught:
        read_texts(file, "body")
    assert caught.value.where.endswith("line 2")
