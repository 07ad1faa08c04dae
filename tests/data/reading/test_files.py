"""Files of every kind are read row by row, with the line of each."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pytest

from pronghorn.data import clean
from pronghorn.data.reading import RowFile
from pronghorn.data.reading import files as files_module
from pronghorn.data.reading import lines as lines_module
from pronghorn.data.reading.lines import LongLine, Utf8Stream, read_lines
from pronghorn.errors import CommandMisused, RowsUnreadable


def read(path, data, **options):
    path.write_bytes(data)
    file = RowFile(path, **options)
    return file, list(file.records())


def places(records):
    return [(record.line, record.row, record.value) for record in records]


def told(file):
    return [(line, problem.kind) for line, problem in file.told]


def test_json_lines(tmp_path):
    file, records = read(tmp_path / "r.jsonl", b'{"a":1}\n\n{"a":2}\r\n// note\n{"a":3}{"a":4}\n{"a": "x')
    assert file.container == "JSON Lines"
    assert places(records)[:2] == [(1, 1, {"a": 1}), (3, 2, {"a": 2})]
    assert records[2].repairs == ("comment",) and records[2].text == b""
    assert places(records)[3:5] == [(5, 3, {"a": 3}), (5, 4, {"a": 4})]
    assert records[5].line == 6 and records[5].problem.kind == "truncated"
    assert file.blank == 1 and told(file) == [(1, "crlf")]


def test_a_row_over_several_lines_is_joined_and_no_other(tmp_path):
    _, records = read(tmp_path / "r.jsonl", b'{"a": "x\ny\nz"}\n{"b": 1}\n{"c": "x\n{"d": 1}\n{"e": "q\nr\n')
    assert places(records)[:2] == [(1, 1, {"a": "x\ny\nz"}), (4, 2, {"b": 1})]
    assert set(records[0].repairs) == {"split-row", "control-character"}
    assert records[0].original == b'{"a": "x\ny\nz"}'
    kinds = [(record.line, record.problem.kind if record.problem else None) for record in records[2:]]
    assert kinds == [(5, "truncated"), (6, None), (7, "truncated"), (8, "broken-json")]


def test_arrays_and_objects_over_several_lines(tmp_path):
    data = b'[\n {"a": "]}, [\\""},\n // why\n {\'b\': "\'}"},\n\n {"c": [1, {"d": 2}]}\n,]\n'
    file, records = read(tmp_path / "r.json", data)
    assert file.container == "JSON array"
    assert places(records) == [(2, 1, {"a": ']}, ["'}), (3, 2, {"b": "'}"}), (6, 3, {"c": [1, {"d": 2}]})]
    assert told(file) == [(7, "trailing-comma")]
    file, records = read(tmp_path / "o.json", b'{\n "a": 1\n}\n{\n "a": 2\n}\n')
    assert file.container == "JSON objects"
    assert places(records) == [(1, 1, {"a": 1}), (4, 2, {"a": 2})]
    file, records = read(tmp_path / "c.json", b'[{"a": 1}, {"a": ')
    assert told(file) == [(1, "truncated")] and records[1].problem.kind == "truncated"


def test_an_array_in_a_jsonl_file_is_told(tmp_path):
    file, records = read(tmp_path / "r.jsonl", b'[{"a": 1},\n{"a": 2}]\n')
    assert places(records) == [(1, 1, {"a": 1}), (2, 2, {"a": 2})]
    assert told(file) == [(1, "array-in-jsonl")]
    _, records = read(tmp_path / "l.jsonl", b'[{"role": "user"}]\n[{"role": "user"}]\n')
    assert [record.value for record in records] == [[{"role": "user"}]] * 2, "lists as rows stay lists"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_pieces_of_any_size_give_the_same(tmp_path, monkeypatch, size):
    """Texts, comments and multi-byte characters are cut anywhere."""
    rows = [{"a": 'é"\\}], ' * n, "b": ["x'y", {"c": "数据"}]} for n in range(5)]
    array = ("[" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "] ").encode()
    array = array.replace(b"[{", b"[ // it's\n/* a, b } */ {", 1)
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    (tmp_path / "r.json").write_bytes(array)
    (tmp_path / "r.jsonl").write_bytes(lines)
    (tmp_path / "u.jsonl").write_bytes(lines.decode().encode("utf-16"))
    wholes = [places(RowFile(tmp_path / name).records()) for name in ("r.json", "r.jsonl", "u.jsonl")]
    assert [value for _, _, value in wholes[0]] == rows
    assert wholes[1] == wholes[2] and [value for _, _, value in wholes[1]] == rows
    opened = [RowFile(tmp_path / name) for name in ("r.json", "r.jsonl", "u.jsonl")]
    monkeypatch.setattr(lines_module, "CHUNK", max(size, 4))
    assert [places(file.records()) for file in opened] == wholes


def test_csv_as_other_readers_read_it(tmp_path):
    """Blank lines and line ends inside of quotes, quotes inside of fields, a column without a name."""
    data = b',text,b\n\n0,"one\n\n\ntwo\r\nthree",1\n1,5" disk,""\n2,x,3" disk\r\n3,"a ""b""\n, c",y\n'
    file, records = read(tmp_path / "r.csv", data)
    expected = list(csv.reader(io.StringIO(data.decode(), newline="")))
    assert [list(r.value.values()) for r in records] == [row for row in expected if row][1:]
    assert list(records[0].value) == ["Unnamed: 0", "text", "b"]
    assert [r.line for r in records] == [3, 8, 9, 10] and file.blank == 1
    # A quote that never closes costs its own line alone.
    _, records = read(tmp_path / "s.csv", b'a,b\n1,"x\n2,y\n3,z\n')
    assert [r.value and r.value["b"] for r in records] == [None, "y", "z"]
    _, records = read(tmp_path / "m.csv", b"a,b\r1,2\r")
    assert records[0].problem.kind == "csv-header" and "carriage return" in records[0].problem.what


@pytest.mark.parametrize("written", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_by_its_name_needs_no_mark(tmp_path, written):
    row = '{"text": "a word or two of it"}'
    _, records = read(tmp_path / "rows.jsonl", f"{row}\n".encode(written), encoding="utf-16")
    assert [record.value for record in records] == [json.loads(row)]
    _, records = read(tmp_path / "rows.jsonl", row.encode(), encoding="utf-16")
    assert [record.problem is not None for record in records] == [True]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows"])
def test_a_compressed_file_is_told_as_one(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(CommandMisused) as caught:
        RowFile(path)
    assert "compressed" in caught.value.message and f"gzip -d {path}" in caught.value.fix


def test_csv(tmp_path):
    data = b'text,n\r\n"one, ""two""\nthree",1\r\nfour,"2"\r\nfive\r\n"six"x,3\r\n\r\n"open,4\r\n'
    file, records = read(tmp_path / "r.csv", data)
    assert places(records)[:2] == [
        (2, 1, {"text": 'one, "two"\nthree', "n": "1"}),
        (4, 2, {"text": "four", "n": "2"}),
    ]
    assert [(record.line, record.problem.kind) for record in records[2:]] == [
        (5, "csv-fields"), (6, "csv-quote"), (8, "csv-quote"),
    ]  # fmt: skip
    assert told(file) == []  # Windows line ends are CSV's own
    _, records = read(tmp_path / "s.csv", b"a;b\n1,5;2\n")
    assert records[0].value == {"a": "1,5", "b": "2"}
    _, records = read(tmp_path / "t.tsv", b"a\tb\n1,5\t2\n")
    assert records[0].value == {"a": "1,5", "b": "2"}
    _, records = read(tmp_path / "h.csv", b"a,a\n1,2\n")
    assert records[0].problem.kind == "csv-header"
    _, records = read(tmp_path / "big.csv", b'text\n"' + b"x" * 200_000 + b'"\n')
    assert len(records[0].value["text"]) == 200_000, "no limit of the standard reader's"


def test_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"text": str(i), "m": [{"role": "user", "content": "x"}]} for i in range(600)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    file = RowFile(tmp_path / "r.parquet")
    assert [(r.line, r.row, r.value) for r in file.records()] == [
        (0, i + 1, row) for i, row in enumerate(rows)
    ]
    cut = (tmp_path / "r.parquet").read_bytes()[:-20]
    file, records = read(tmp_path / "cut.parquet", cut)
    assert not records and told(file) == [(0, "unreadable")]


def test_a_text_of_a_parquet_file_that_is_no_utf8_is_one_bad_row(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    texts = pa.array([b"a", b"caf\xe9", b"b"], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, texts.buffers())})
    parquet.write_table(table, tmp_path / "r.parquet")
    file = RowFile(tmp_path / "r.parquet")
    first, bad, last = file.records()
    assert (first.value, last.row, last.value) == ({"text": "a"}, 3, {"text": "b"}) and not file.told
    assert bad.problem.kind == "parquet-text" and "E9" in bad.problem.what
    assert (bad.row, bad.original) == (2, b"caf\xe9")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
def test_encodings_with_and_without_a_mark(tmp_path, encoding):
    text = '{"text": "plain ascii, and é 数 😀"}\n{"text": "second"}\n'
    file, records = read(tmp_path / "r.jsonl", text.encode(encoding))
    assert [record.value["text"] for record in records] == ["plain ascii, and é 数 😀", "second"]
    assert told(file) == [(1, "bom" if encoding == "utf-8-sig" else "utf-16")]


def test_an_encoding_that_is_named(tmp_path):
    _, records = read(tmp_path / "r.jsonl", '{"text": "café “x”"}\n'.encode("cp1252"), encoding="cp1252")
    assert records[0].value == {"text": "café “x”"}
    _, records = read(tmp_path / "r.jsonl", b'{"text": "\x81"}\n{"text": "ok"}\n', encoding="cp1252")
    assert records[0].problem.kind == "not-utf-8" and records[1].value == {"text": "ok"}
    with pytest.raises(CommandMisused):
        RowFile(tmp_path / "r.jsonl", "hex")


def test_half_a_character_at_the_end_of_utf16_is_told(tmp_path):
    _, records = read(tmp_path / "r.jsonl", '{"text": "a"}\n{"text": "b"}'.encode("utf-16") + b"x")
    assert records[0].value == {"text": "a"}
    assert records[1].problem is not None


def test_long_lines_keep_their_beginning_only(tmp_path, monkeypatch):
    monkeypatch.setattr(lines_module, "CHUNK", 1000)
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"a\n" + b"x" * 5000 + b"\nb\n" + b"y" * 3_000_000)
    with path.open("rb") as stream:
        lines = [line for part in read_lines(Utf8Stream(stream), limit=4000) for line in part]
    assert lines[0] == b"a" and lines[2] == b"b"
    assert isinstance(lines[1], LongLine) and isinstance(lines[3], LongLine)
    assert len(lines[3]) <= lines_module.KEPT_OF_LONG


def test_an_element_that_never_ends_is_bounded(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    path.write_bytes(b'[{"a": 1}, {"a": "' + b"x" * 100_000 + b'"}, {"a": 2}]')
    split = files_module.split_elements
    monkeypatch.setattr(files_module, "split_elements", lambda *a: split(*a, limit=1000))
    monkeypatch.setattr(lines_module, "CHUNK", 400)
    file = RowFile(path)
    assert [record.value for record in file.records()] == [{"a": 1}]
    assert told(file) == [(1, "long-line")]
    with pytest.raises(RowsUnreadable):  # what stands behind it would be missing
        clean(path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("name", ["absent.jsonl", "folder", "rows.docx", "null\0byte"])
def test_what_is_no_file_of_rows(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.docx").write_bytes(b"PK\x03\x04")
    with pytest.raises(CommandMisused):
        RowFile(tmp_path / name)


def test_an_unknown_name_with_json_in_it_is_read(tmp_path):
    file, records = read(tmp_path / "rows", b'{"text": "a"}\n')
    assert file.container == "JSON Lines" and records[0].value == {"text": "a"}
