"""Cleaning repairs what is safe, sets the rest aside, loses nothing, and changes nothing the second time."""

from __future__ import annotations

import json
import os

import pytest

from pronghorn.data import clean
from pronghorn.errors import CommandMisused, RowsUnreadable


def chat(number=0, **extra):
    turns = [
        {"role": "user", "content": f"question {number}"},
        {"role": "assistant", "content": f"é {number}"},
    ]
    return {"messages": turns, **extra}


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def rows_of(path):
    return [json.loads(line) for line in lines_of(path)]


def cleaned(tmp_path, data, name="in.jsonl", **options):
    source, target = tmp_path / name, tmp_path / "out.jsonl"
    source.write_bytes(data)
    result = clean(source, target, force=True, **options)
    assert result.rows_in == result.rows_out + result.rows_rejected + result.duplicates
    assert result.rows_out == len(target.read_bytes().splitlines())
    before = target.read_bytes()
    again = clean(target, tmp_path / "again.jsonl", force=True, **{**options, "encoding": None})
    assert (tmp_path / "again.jsonl").read_bytes() == before, "the second time nothing changes"
    assert not again.repairs and not again.rejected and not again.duplicates
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    return result, rows_of(target)


def test_rows_that_are_right_are_copied_byte_for_byte(tmp_path):
    data = (
        '{"text" : "caf\\u00e9", "n": 1.10}\n {"text":"é\\/"} \n'.encode()
        + json.dumps(chat(), ensure_ascii=True).encode()
        + b"\n"
    )
    result, _ = cleaned(tmp_path, data)
    assert (tmp_path / "out.jsonl").read_bytes() == data
    assert not result.repairs and result.rejected_file is None
    assert not (tmp_path / "out.rejected.jsonl").exists()


def test_repairs_and_rejects_are_counted_and_kept(tmp_path):
    good = json.dumps(chat(1))
    data = "\n".join(
        [
            "\ufeff" + good,
            str(chat(2)),
            good[:-1] + ",}\r",
            "",
            "# a comment",
            good + good,
            good[:30],
            "[1, 2]",
            json.dumps({"messages": []}),
            json.dumps({"messages": [{"role": "user", "content": "alone"}]}),
            json.dumps({"other": 1}),
            '{"messages": [{"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"}]}',
        ]
    ).encode()
    result, rows = cleaned(tmp_path, data)
    assert rows == [chat(1), chat(2), chat(1), chat(1), chat(1), {"messages": [
        {"role": "user", "content": "a\nb"}, {"role": "assistant", "content": "c"},
    ]}]  # fmt: skip
    assert result.repairs == {
        "bom": 1, "crlf": 1, "single-quotes": 1, "trailing-comma": 1, "comment": 1, "concatenated": 1,
        "split-row": 1, "control-character": 1,
    }  # fmt: skip
    assert result.rejected == {
        "truncated": 1, "not-a-row": 1, "empty-field": 1, "no-answer": 1, "missing-field": 1,
    }  # fmt: skip
    assert result.blank_lines == 1
    kept = rows_of(tmp_path / "out.rejected.jsonl")
    assert [(row["line"], row["kind"]) for row in kept] == [
        (7, "truncated"), (8, "not-a-row"), (9, "empty-field"), (10, "no-answer"), (11, "missing-field"),
    ]  # fmt: skip
    assert kept[0]["original"] == good[:30] and all(row["reason"] for row in kept)


def test_bytes_that_are_no_text_are_kept_as_they_are(tmp_path):
    import base64

    result, rows = cleaned(tmp_path, b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    assert rows == [{"text": "a"}]
    kept = rows_of(tmp_path / "out.rejected.jsonl")[0]
    assert base64.b64decode(kept["original_base64"]) == b'{"text": "caf\xe9"}'
    result, rows = cleaned(tmp_path, b'{"text": "caf\xe9"}\n', encoding="latin-1")
    assert rows == [{"text": "café"}] and not result.rejected


def test_duplicates_go_only_when_asked(tmp_path):
    data = "".join(json.dumps(row) + "\n" for row in (chat(1, id=1), chat(1, id=2), chat(2)))
    result, rows = cleaned(tmp_path, data.encode())
    assert len(rows) == 3 and not result.duplicates
    result, rows = cleaned(tmp_path, data.encode(), dedup=True)
    assert rows == [chat(1, id=1), chat(2)] and result.duplicates == 1


def test_other_files_become_json_lines(tmp_path):
    result, rows = cleaned(tmp_path, b"prompt,completion\na,1\nb,\nc\n", "in.csv")
    assert rows == [{"prompt": "a", "completion": "1"}]
    assert result.rejected == {"empty-field": 1, "csv-fields": 1}
    _, rows = cleaned(tmp_path, "eins\n\nzwei é\n".encode("utf-16"), "in.txt")
    assert rows == [{"text": "eins"}, {"text": "zwei é"}]
    array = json.dumps([chat(1), chat(2)], indent=2)
    _, rows = cleaned(tmp_path, array.encode(), "in.json")
    assert rows == [chat(1), chat(2)]
    messages = json.dumps(chat(1)["messages"]).replace('"', '""')
    result, rows = cleaned(tmp_path, f'messages\n"{messages}"\n'.encode(), "m.csv")
    assert rows == [chat(1)] and result.repairs == {"json-in-text": 1}


def test_parquet_values_that_json_lacks(tmp_path):
    import datetime

    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        {"text": "a", "score": 1.5, "day": datetime.date(2024, 1, 2)},
        {"text": "b", "score": float("nan"), "day": None},
        {"text": "c", "score": float("inf"), "day": None},
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    result = clean(tmp_path / "in.parquet", tmp_path / "out.jsonl")
    assert rows_of(tmp_path / "out.jsonl") == [
        {"text": "a", "score": 1.5, "day": "2024-01-02"},
        {"text": "b", "score": None, "day": None},
    ]
    assert result.repairs == {"nan": 1} and result.rejected == {"infinity": 1}
    parquet.write_table(pa.table({"text": ["a"], "data": [b"\x00"]}), tmp_path / "in.parquet")
    assert clean(tmp_path / "in.parquet", tmp_path / "o.jsonl").rejected == {"wrong-type": 1}


def test_no_file_is_replaced_unasked_and_the_source_never(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "a"}\n')
    target.write_text("mine\n")
    (tmp_path / "link.jsonl").symlink_to(source)
    os.link(source, tmp_path / "hard.jsonl")
    for name in ("in.jsonl", "link.jsonl", "hard.jsonl", "out.jsonl", "out.csv", "absent/out.jsonl"):
        with pytest.raises(CommandMisused):
            clean(source, tmp_path / name)
    for name in ("in.jsonl", "link.jsonl", "hard.jsonl"):
        with pytest.raises(CommandMisused):
            clean(source, tmp_path / name, force=True)
    assert source.read_text() == '{"text": "a"}\n' and target.read_text() == "mine\n"
    (tmp_path / "new.rejected.jsonl").write_text("mine\n")
    with pytest.raises(CommandMisused):
        clean(source, tmp_path / "new.jsonl")
    clean(source, tmp_path / "new.jsonl", force=True)
    assert not (tmp_path / "new.rejected.jsonl").exists(), "rejects of an earlier run are not these"


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "real.jsonl").write_text("old\n")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    clean(tmp_path / "in.jsonl", tmp_path / "link.jsonl", force=True)
    assert (tmp_path / "link.jsonl").is_symlink()
    assert (tmp_path / "real.jsonl").read_text() == '{"text": "a"}\n'


def test_a_file_that_cannot_be_read_to_its_end_leaves_nothing(tmp_path):
    (tmp_path / "in.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(RowsUnreadable):
        clean(tmp_path / "in.parquet", tmp_path / "out.jsonl")
    assert os.listdir(tmp_path) == ["in.parquet"]


def test_an_interrupt_leaves_nothing(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "a"}\n' * 5000)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        clean(tmp_path / "in.jsonl", tmp_path / "out.jsonl", progress=interrupt)
    assert os.listdir(tmp_path) == ["in.jsonl"]
