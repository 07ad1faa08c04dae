"""`pronghorn compare-adapters`: what is asked, and what is printed."""

from __future__ import annotations

import json

import pytest

from pronghorn.cli.compare_adapters import PROMPTS, conversation_of, read_rows
from pronghorn.cli.main import main
from pronghorn.errors import RowsUnreadable
from tests.inference.adapters import save_base_and_adapters

ROWS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the deer"}]},
    {"instruction": "Name it", "input": "deer", "output": "pronghorn"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = save_base_and_adapters(tmp_path_factory.mktemp("compared"))
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def asked(folder, *arguments):
    given = [f"--adapter=a={folder / 'formal'}", "--max-new-tokens", "4", *arguments]
    return main(["compare-adapters", str(folder / "base"), *given])


def test_scores_of_held_out_rows(folder, capsys):
    assert asked(folder, "--data", str(folder / "rows.jsonl"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["variants"] == ["base", "a"]
    assert [item["question"] for item in found["questions"]] == ["Hi", "Name it\n\ndeer"]
    assert [item["reference"] for item in found["questions"]] == ["the deer", "pronghorn"]
    assert set(found["questions"][0]["answers"]) == set(found["scores"]) == {"base", "a"}
    assert found["scores"]["a"]["loss"] != found["scores"]["base"]["loss"]


def test_what_people_read(folder, capsys):
    assert asked(folder, "--data", str(folder / "rows.jsonl"), "--rows", "1") == 0
    text = capsys.readouterr().out
    assert "== Hi" in text and "(the row):\n  the deer" in text
    assert "held-out rows: 1" in text and "perplexity" in text


def test_questions_of_our_own(folder, capsys):
    assert asked(folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["question"] for item in found["questions"]] == list(PROMPTS)
    assert found["scores"] == {}


def test_a_line_is_a_question(folder, tmp_path, capsys):
    (tmp_path / "questions.txt").write_text("One?\n\nTwo?\n")
    assert asked(folder, "--prompts", str(tmp_path / "questions.txt"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["question"] for item in found["questions"]] == ["One?", "Two?"]


def test_one_model_alone(folder, capsys):
    assert main(["compare-adapters", str(folder / "base")]) == 2
    assert "--adapter NAME=PATH" in capsys.readouterr().err


def test_conversations_end_with_a_question():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert conversation_of({"messages": turns}) == turns[:1]
    assert conversation_of({"prompt": turns[:1]}) == turns[:1]
    assert conversation_of({"instruction": "a", "input": "b"}) == [{"role": "user", "content": "a\n\nb"}]
    for row in ({"messages": turns[1:]}, {"prompt": " "}, {"other": 1}):
        with pytest.raises(RowsUnreadable):
            conversation_of(row)


def test_rows_that_are_broken(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n[1, 2]\n')
    assert read_rows(str(path), 1) == [{"prompt": "a"}]
    with pytest.raises(RowsUnreadable) as found:
        read_rows(str(path), 2)
    assert found.value.where.endswith("row 2")
    path.write_text("")
    with pytest.raises(RowsUnreadable, match="no rows"):
        read_rows(str(path), 2)
