"""Broken JSON is repaired where it has one reading, and refused where it has several."""

from __future__ import annotations

import json

import pytest

from pronghorn.data.reading import parse

REPAIRED = {
    "single-quotes": [
        ("{'a': 'x', \"b\": 'it\\'s'}", {"a": "x", "b": "it's"}),
        ("{'a': 'say \"hi\"'}", {"a": 'say "hi"'}),
        ("{'a': \"it's\\xa0here\"}", {"a": "it's\xa0here"}),
        ("{'a': 'C:\\new\\d'}", {"a": "C:\new\\d"}),
    ],
    "trailing-comma": [('{"a": [1, 2,],}', {"a": [1, 2]}), ('{"a": 1},', {"a": 1})],
    "comment": [
        ('{"a": 1} // why', {"a": 1}),
        ('{"a": /* no */ "# /* kept */"} # end', {"a": "# /* kept */"}),
    ],
    "control-character": [('{"a": "x\ty\x00z"}', {"a": "x\ty\x00z"})],
    "bad-escape": [
        (r'{"a": "\alpha \d \u12 C:\temp"}', {"a": "\\alpha \\d \\u12 C:\temp"}),
        (r'{"a": "it\'s"}', {"a": "it's"}),
    ],
    "python-literal": [('{"a": None, "b": [True, False]}', {"a": None, "b": [True, False]})],
    "unquoted-key": [('{a: 1, b_2: {c: "d"}}', {"a": 1, "b_2": {"c": "d"}})],
    "nan": [('{"a": NaN}', {"a": None})],
    "duplicate-key": [('{"a": {"x": 1, "y": 2}, "a": {"y": 2, "x": 1}}', {"a": {"x": 1, "y": 2}})],
    "bom": [('\ufeff{"a": 1}', {"a": 1})],
}


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [(kind, text, value) for kind, cases in REPAIRED.items() for text, value in cases],
)
def test_repaired(kind, text, value):
    parsed = parse(text.encode())
    assert parsed.problem is None
    assert parsed.values == [value]
    assert kind in parsed.repairs
    assert [json.loads(text) for text in parsed.texts] == [value]
    again = parse(parsed.texts[0].encode())
    assert again.texts is None and again.values == [value], "what was repaired is JSON"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("{'a': 'it's'}", "broken-json"),
        ("{'a': 'x', 'b': 'rock 'n' roll'}", "broken-json"),
        ('{"a": "x" "b": 1}', "broken-json"),
        ('{"a" 1}', "broken-json"),
        ('{"a": 1} and more', "broken-json"),
        ('{"a": “x”}', "broken-json"),
        ('{"a": undefined}', "broken-json"),
        ('{"a": datetime(2020, 1, 1)}', "broken-json"),
        ('{"a": 1' + "0" * 5000 + "}", "broken-json"),
        ('{"a": 1, "a": 2}', "conflicting-key"),
        ('{"a": 1, "a": true}', "conflicting-key"),
        ('{"a": Infinity}', "infinity"),
        ('{"a": -Infinity}', "infinity"),
        ('{"a": "x', "truncated"),
        ('{"a": ["x", ', "truncated"),
        ('{"a": tru', "truncated"),
        (r'{"a": "\ud83d"}', "lone-surrogate"),
        (r'{"a": "\\\ud83d"}', "lone-surrogate"),
        (r'{"a": "\\ud83d\ude00"}', "lone-surrogate"),
        ("[" * 100_000, "too-deep"),
        ("{'a':" * 5000, "too-deep"),
        ('{"a": ' + "[" * 300 + "]" * 300 + "}", "too-deep"),
        ("\x00\x00\x00", "broken-json"),
    ],
)
def test_refused(text, kind):
    parsed = parse(text.encode())
    assert parsed.problem is not None and parsed.problem.kind == kind
    assert not parsed.values


def test_many_brackets_are_not_deep():
    row = {"a": [{"b": [i]} for i in range(200)], "t": "[" * 500}
    assert parse(json.dumps(row).encode()).values == [row]


def test_what_is_json_is_left_as_it_is():
    for text in (
        r'{"a": "\ud83d\ude00 \u00e9 \ud55c\uae00 \\ud83d \/ \b"}',
        ' {"a" : 1.10, "b": 1e5, "c": 12345678901234567890.12345678901234567890} ',
        '{"a": "// no comment, \'quotes\', None, NaN"}',
    ):
        parsed = parse(text.encode())
        assert parsed.texts is None and parsed.values == [json.loads(text)]


def test_numbers_and_texts_keep_their_spelling():
    parsed = parse(rb'{"n": 1.10, "m": 123456789012345678901234567890, "t": "\u00e9\/",}')
    assert parsed.texts == (r'{"n": 1.10, "m": 123456789012345678901234567890, "t": "\u00e9\/"}',)


def test_several_rows_on_a_line():
    parsed = parse(b'{"a": 1}{"a": 2}, {"a": 3}')
    assert parsed.values == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert parsed.repairs == ("concatenated",)


def test_bytes_that_are_no_utf8_are_not_guessed():
    parsed = parse(b'{"a": "caf\xe9"}')
    assert parsed.problem.kind == "not-utf-8"
    assert "Windows-1252" in parsed.problem.what and "café" in parsed.problem.what
