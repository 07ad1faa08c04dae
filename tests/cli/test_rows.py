"""Rows are read from files, and a bad line is named."""

import json

import pytest
from datasets import Dataset

from pronghorn.cli.rows import load_rows
from pronghorn.config import parse_config
from pronghorn.data import check
from pronghorn.errors import ConfigInvalid, PronghornError, RowInvalid, RowsUnreadable


def chat(number):
    return {
        "messages": [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    }


def config_for(dataset, extra="", overrides=()):
    text = f"model:\n  name: tiny\ndata:\n  dataset: {dataset}\n{extra}"
    return parse_config(text, "run.yaml", overrides)


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def refused(config) -> PronghornError:
    with pytest.raises(PronghornError) as caught:
        load_rows(config)
    return caught.value


def test_jsonl_held_back_and_limit(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [chat(i) for i in range(20)])
    rows = load_rows(config_for(path, "  held_back: 4\n  limit: 12\n"))
    assert (len(rows.train), len(rows.held_back)) == (8, 4)
    assert rows.are_chats
    texts = [row["messages"][0]["content"] for part in (rows.train, rows.held_back) for row in part]
    assert texts == [f"question {i}" for i in rows.train_numbers + rows.held_back_numbers]
    assert sorted(rows.train_numbers + rows.held_back_numbers) == list(range(12))
    again = load_rows(config_for(path, "  held_back: 4\n  limit: 12\n"))
    assert list(again.train["messages"]) == list(rows.train["messages"])


def test_an_error_about_a_row_names_its_line(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ["", *(chat(i) for i in range(20))])
    rows = load_rows(config_for(path, "  held_back: 4\n"))
    for name, numbers in (("train", rows.train_numbers), ("eval", rows.held_back_numbers)):
        with pytest.raises(RowInvalid) as caught, rows.naming_lines():
            raise RowInvalid("no message", where=f"row 3 of the {name} data")
        assert caught.value.where == f"{path}, line {numbers[3] + 2}"


def test_further_rows_of_an_error_are_not_numbered_after_rows_were_held_back(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [chat(i) for i in range(20)])
    message = "7 of 20 rows have no token to train on"
    for listed in (": rows 3, 4", ": rows 3, 4, 5, 6, 7, …"):
        with (
            pytest.raises(RowInvalid) as caught,
            load_rows(config_for(path, "  held_back: 4\n")).naming_lines(),
        ):
            raise RowInvalid(message + listed, where="row 3 of the train data")
        assert caught.value.message == message


@pytest.mark.parametrize(
    ("name", "text"),
    [("rows.csv", "text\none\ntwo\n"), ("rows.json", '[{"text": "one"}, {"text": "two"}]')],
)
def test_other_files(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    rows = load_rows(config_for(tmp_path / name, "  text_field: text\n"))
    assert list(rows.train["text"]) == ["one", "two"]
    assert rows.held_back is None
    assert not rows.are_chats


def test_parquet_and_saved_folder(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"text": "one"}])
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    for name in ("rows.parquet", "saved"):
        assert list(load_rows(config_for(tmp_path / name)).train["text"]) == ["one"]


def test_docstrings():
    rows = load_rows(config_for("docstrings", "  held_back: 10\n  limit: 50\n"))
    assert (len(rows.train), len(rows.held_back)) == (40, 10)
    assert rows.train[0]["messages"][1]["role"] == "assistant"


@pytest.mark.parametrize(
    ("lines", "where", "what"),
    [
        ([chat(0), '{"messages": [', chat(1)], "line 2", "not JSON"),
        ([chat(0), str(chat(1))], "line 2", "single quotes"),
        ([chat(0), chat(1), "[1, 2]"], "line 3", "not a row"),
        ([{"text": "a"}, "", '{"text": "\\ud800"}'], "line 3", "surrogate"),
    ],
)
def test_bad_line_is_named(tmp_path, lines, where, what):
    path = write_lines(tmp_path / "rows.jsonl", lines)
    error = refused(config_for(path))
    assert isinstance(error, RowsUnreadable)
    assert error.where == f"{path}, {where}"
    assert what in error.message
    assert error.fix


@pytest.mark.parametrize(
    ("name", "data", "column", "values"),
    [
        ("a.jsonl", '{"text": "2024-01-01"}\n{"text": "2024-02-03"}\n', "text", ["2024-01-01", "2024-02-03"]),
        ("b.csv", "prompt,text\np,007\np,NA\np,1.50\np,True\n", "text", ["007", "NA", "1.50", "True"]),
        ("c.csv", 'text,b\n"a\n\nb",\n5" disk,\n', "text", ["a\n\nb", '5" disk']),
        ("d.csv", " text , b \nx,3\ny,\n", "b", ["3", ""]),
        ("e.jsonl", '{"text": "x", "id": 1}\n{"text": "y", "id": "5"}\n', "id", [1, "5"]),
        ("f.jsonl", '{"text": "x", "id": 1}\n{"text": "y", "id": 1e30, "k": []}\n', "k", [None, []]),
        ("g.jsonl", '{"input_ids": [1, 2]}\n\n{"input_ids": []}\n', "input_ids", [[1, 2], []]),
    ],
)
def test_rows_hold_what_the_file_holds(tmp_path, name, data, column, values):
    path = tmp_path / name
    path.write_text(data)
    assert list(load_rows(config_for(path)).train[column]) == values


def test_what_a_row_nests_stays_as_it_is(tmp_path):
    """No key of another row is added to a message, and a key may appear late."""
    call = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, "y", None]}}}],
    }
    rows = [chat(0), {"messages": [*chat(1)["messages"], call], "tools": [{"name": "f"}]}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    assert list(load_rows(config_for(path)).train["messages"]) == [row["messages"] for row in rows]
    # A file that has changed is read again.
    write_lines(path, [*rows, chat(2)])
    assert len(load_rows(config_for(path)).train) == 3


def test_conversations_are_found_wherever_they_stand(tmp_path):
    turns = [{"role": "assistant", "content": "a"}, *chat(1)["messages"]]
    for row, expected in (
        (chat(1), True),
        ({"prompt": "q", "completion": turns}, True),
        ({"prompt": "q", "completion": turns[:1]}, False),
    ):
        path = write_lines(tmp_path / "rows.jsonl", [{"instruction": "q", "output": "a"}, row])
        assert load_rows(config_for(path)).are_chats is expected


def test_broken_files_of_other_kinds_are_named_too(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "a"},\n{"text": \'b\'}]')
    error = refused(config_for(path))
    assert error.where == f"{path}, line 2" and f"pronghorn data clean {path} " in error.fix
    path = write_lines(tmp_path / "rows.csv", ["text,b", "x,1", "y,1,2", "z,1"])
    error = refused(config_for(path))
    assert error.where == f"{path}, line 3" and "3 fields and the header 2" in error.message


def test_what_is_not_there(tmp_path):
    error = refused(config_for(tmp_path / "absent.jsonl"))
    assert isinstance(error, ConfigInvalid)
    assert error.where == "run.yaml, line 4"
    (tmp_path / "rows.txt").write_text("text")
    assert ".jsonl" in refused(config_for(tmp_path / "rows.txt")).fix


def test_empty_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    assert isinstance(refused(config_for(tmp_path / "rows.jsonl")), RowsUnreadable)


def test_too_many_held_back_and_unknown_column(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": "two"}])
    assert refused(config_for(path, "  held_back: 2\n")).where == "run.yaml, line 5"
    assert "columns are text" in refused(config_for(path, "  text_field: body\n")).fix


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", "instruction;input;output\nAdd 1, please;;2\nAdd 2;;3\n"),
        ("rows.tsv", "instruction\tinput\toutput\nAdd 1, please\t\t2\nAdd 2\t\t3\n"),
        ("rows.csv", 'instruction,input,output\r\n"Add 1, please",,2\r\nAdd 2,,3\r\n'),
    ],
)
def test_tables_are_divided_as_the_data_commands_divide_them(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    rows = load_rows(config_for(tmp_path / name))
    assert list(rows.train["instruction"]) == ["Add 1, please", "Add 2"]


def test_json_lines_under_their_other_name(tmp_path):
    path = write_lines(tmp_path / "rows.ndjson", [chat(0), "", chat(1)])
    with pytest.raises(RowInvalid) as caught, load_rows(config_for(path)).naming_lines():
        raise RowInvalid("no message", where="row 1 of the train data")
    assert caught.value.where == f"{path}, line 3"


def test_an_error_about_a_row_of_another_file_names_it(tmp_path):
    path = write_lines(tmp_path / "rows.csv", ["text", "one", "two"])
    with pytest.raises(RowInvalid) as caught, load_rows(config_for(path)).naming_lines():
        raise RowInvalid("no message", where="row 1 of the train data")
    assert caught.value.where == f"{path}, row 2"


def test_rows_inside_an_object_are_told(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"data": [chat(0), chat(1)]}))
    error = refused(config_for(path, "  held_back: 1\n"))
    assert isinstance(error, RowsUnreadable)
    assert error.where == str(path) and "2 objects inside 'data'" in error.message


def test_a_chat_alone_in_a_file_is_a_row(tmp_path):
    path = write_lines(tmp_path / "rows.json", [chat(0)])
    assert load_rows(config_for(path)).are_chats


def test_files_of_other_encodings_and_damaged_ones(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("instruction,output\nCafé,né\n".encode("latin-1"))
    error = refused(config_for(path))
    assert error.where == f"{path}, line 2"
    assert error.fix.startswith(f"pronghorn data clean {path} {tmp_path / 'rows-clean.jsonl'} --encoding")
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and nothing else")
    error = refused(config_for(path))
    assert error.where == str(path) and error.message.startswith("this Parquet file cannot be read")


def test_texts_of_a_parquet_file_that_are_no_utf8_are_named(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    texts = pa.array([b"a", b"caf\xe9"], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 2, texts.buffers())})
    parquet.write_table(table, tmp_path / "rows.parquet")
    error = refused(config_for(tmp_path / "rows.parquet"))
    assert isinstance(error, RowsUnreadable) and error.where == f"{tmp_path / 'rows.parquet'}, row 2"
    assert "E9" in error.message and "data clean sets it aside" in error.fix
    error = refused(config_for(tmp_path))
    assert isinstance(error, RowsUnreadable) and "UTF" in error.message


EMPTY = {
    "chat": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " "}]},
    "pair": {"prompt": "q", "completion": ""},
    "alpaca": {"instruction": "q", "input": "", "output": ""},
    "text": {"text": "\n"},
}
SOUND = {
    "chat": chat(1),
    "pair": {"prompt": "q", "completion": "a"},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "text": {"text": "a"},
}


@pytest.mark.parametrize("kind", EMPTY)
def test_what_check_calls_an_error_is_refused(tmp_path, kind):
    sound, empty = SOUND[kind], EMPTY[kind]
    path = write_lines(tmp_path / "rows.jsonl", [sound, "", empty, sound, empty, empty])
    error = refused(config_for(path, "  held_back: 1\n"))
    assert isinstance(error, RowInvalid) and error.where == f"{path}, line 3"
    assert "2 further rows" in error.message and f"pronghorn data clean {path}" in error.fix
    report = check(path)
    assert {finding.place for finding in report.findings if finding.kind == "empty-field"} == {
        f"{path}:{line}" for line in (3, 5, 6)
    }
    dropped = config_for(path, "training:\n  drop_unsupervised_rows: true\n")
    assert load_rows(dropped).train_numbers == [0, 2]
    assert load_rows(config_for(path, "  limit: 1\n")).train_numbers == [0]


def test_rows_of_tokens_have_no_texts_to_look_at(tmp_path):
    for name, row in (
        ("a", {"input_ids": [1, 2]}),
        ("b", {"input_ids": [1, 2], "text": ""}),
        ("c", {"other": 1}),
    ):
        path = write_lines(tmp_path / f"{name}.jsonl", [row] * 3)
        assert load_rows(config_for(path)).train_numbers == [0, 1, 2]


def test_several_files_are_one_set_of_rows(tmp_path):
    first = write_lines(tmp_path / "a.jsonl", ["", {"text": "a0"}, {"text": "a1"}])
    second = write_lines(tmp_path / "b.csv", ["text,id", "b0,007", "b1,2024-01-01"])
    for given in (f"[{first}, {second}]", f"[{tmp_path}/*.jsonl, {tmp_path}/b.*]"):
        rows = load_rows(config_for(given, "  held_back: 1\n"))
        assert sorted([*rows.train["text"], *rows.held_back["text"]]) == ["a0", "a1", "b0", "b1"]
        assert {"007", "2024-01-01"} <= {*rows.train["id"], *rows.held_back["id"]}
        places = {rows.places.of_row(number) for number in rows.train_numbers + rows.held_back_numbers}
        assert places == {f"{first}, line 2", f"{first}, line 3", f"{second}, row 1", f"{second}, row 2"}
    assert list(load_rows(config_for(f"'{tmp_path}/*.jsonl'")).train["text"]) == ["a0", "a1"]
    write_lines(tmp_path / "c.jsonl", [chat(1), '{"messages": [', chat(2)])
    assert refused(config_for(f"[{first}, {tmp_path}/c.jsonl]")).where == f"{tmp_path}/c.jsonl, line 2"


def test_what_is_wrong_with_several_files_is_told(tmp_path):
    import datasets

    path = write_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": " "}, {"text": " "}])
    assert "no file" in refused(config_for(f"[{path}, {tmp_path}/missing.jsonl]")).message
    assert "no file" in refused(config_for(f"'{tmp_path}/*.csv'")).message
    assert "names no file" in refused(config_for("[]")).message
    assert "is a folder" in refused(config_for(f"[{tmp_path}]")).message
    assert refused(config_for(f"[{path}]")).where == f"{path}, line 2"
    rows = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    for name in ("p", "q"):
        rows.to_parquet(str(tmp_path / f"{name}.parquet"))
    assert "not read together" in refused(config_for(f"[{path}, {tmp_path}/p.parquet]")).message
    both = load_rows(config_for(f"'{tmp_path}/*.parquet'"))
    assert both.places.of_row(2) == f"{tmp_path}/q.parquet, row 1" and len(both.train) == 4


def test_a_folder_is_read_as_its_files_are(tmp_path, caplog):
    rows = [{"text": "2024-01-01"}, {"text": "a", "late": {"x": [1, "y"]}}]
    write_lines(tmp_path / "train-1.jsonl", rows)
    write_lines(tmp_path / "train-2.jsonl", ["", {"text": "b", "id": "007"}])
    write_lines(tmp_path / "test.jsonl", [{"text": "tested"}])
    found = load_rows(config_for(tmp_path))
    assert list(found.train["text"]) == ["2024-01-01", "a", "b"]
    assert list(found.train["late"]) == [None, {"x": [1, "y"]}, None]
    assert found.places.of_row(2) == f"{tmp_path / 'train-2.jsonl'}, line 2"
    for split, texts in (
        ("test", ["tested"]),
        ("train[1:]", ["a", "b"]),
        ("test+train[:1]", ["tested", "2024-01-01"]),
    ):
        rows = load_rows(config_for(tmp_path, f"  split: {split}\n"))
        assert list(rows.train["text"]) == texts
    assert "no split 'dev', only" in refused(config_for(tmp_path, "  split: dev\n")).message
    assert not caplog.records
    (tmp_path / "more.csv").write_text("text\nb\n")
    write_lines(tmp_path / "extra.jsonl", [{"text": "x"}])
    (tmp_path / "dataset_infos.json").write_text("{}")
    load_rows(config_for(tmp_path))
    assert "left out: extra.jsonl, more.csv;" in caplog.text
    (tmp_path / "more.csv").unlink()
    write_lines(tmp_path / "train-2.jsonl", ["{'text': 'x'}"])
    assert refused(config_for(tmp_path)).where == f"{tmp_path / 'train-2.jsonl'}, line 1"


def test_rows_to_evaluate_on_come_from_another_file_or_split(tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"text": f"t{i}"} for i in range(4)])
    other = write_lines(tmp_path / "validation.jsonl", ["", {"text": "v0"}, {"text": "v1"}])
    for extra in (f"  eval_dataset: {other}\n", "  eval_split: validation\n"):
        rows = load_rows(config_for(tmp_path, f"{extra}  limit: 3\n"))
        assert list(rows.train["text"]) == ["t0", "t1", "t2"]
        assert list(rows.held_back["text"]) == ["v0", "v1"]
        with pytest.raises(RowInvalid) as caught, rows.naming_lines():
            raise RowInvalid("no text", where="row 1 of the eval data")
        assert caught.value.where == f"{other}, line 3"
        with pytest.raises(ConfigInvalid, match="both say which rows"):
            config_for(tmp_path, f"{extra}  held_back: 2\n")
    missing = refused(config_for(tmp_path, "  eval_dataset: missing.jsonl\n"))
    assert missing.where == "run.yaml, line 5" and "missing.jsonl" in missing.message
    none = refused(config_for(tmp_path, "  eval_dataset: []\n"))
    assert none.where == "run.yaml, line 5" and "names no file" in none.message
    write_lines(other, [{"text": " "}])
    assert refused(config_for(tmp_path, "  eval_split: validation\n")).where == f"{other}, line 1"
    with pytest.raises(ConfigInvalid, match="did you mean 'eval_dataset'"):
        config_for(tmp_path, "  validation_dataset: x.jsonl\n")


def test_a_part_of_rows_without_splits(tmp_path):
    texts = [f"t{i}" for i in range(4)]
    file = write_lines(tmp_path / "rows.jsonl", ["", *({"text": text} for text in texts)])
    data = Dataset.from_dict({"text": texts})
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "rows.parquet")
    for name in (file, f"[{file}]", tmp_path / "saved", tmp_path / "rows.parquet"):
        found = load_rows(config_for(name, "  split: train[1:3]\n"))
        assert list(found.train["text"]) == ["t1", "t2"]
        error = refused(config_for(name, "  split: test\n"))
        assert error.where == "run.yaml, line 5" and "'test' is asked for" in error.message
    assert (
        found.places.of_row(found.train_numbers[0]).endswith("rows.parquet, row 2") or not found.places.files
    )
    found = load_rows(config_for(file, "  split: train[1:3]\n"))
    assert found.places.of_row(found.train_numbers[1]) == f"{file}, line 4"
    whole = len(load_rows(config_for("docstrings")).train)
    assert len(load_rows(config_for("docstrings", "  split: 'train[:25%]'\n")).train) in (
        whole // 4,
        whole // 4 + 1,
    )
    error = refused(config_for(file, f"  eval_dataset: {file}\n  eval_split: test\n"))
    assert error.where == "run.yaml, line 6" and error.code == "PH401"


def test_a_split_to_evaluate_on_is_refused_of_rows_that_have_none(tmp_path):
    """It would be all rows that are trained on."""
    file = write_lines(tmp_path / "train.jsonl", [{"text": f"t{i}"} for i in range(4)])
    Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    for name in (file, f"[{file}]", tmp_path / "*.jsonl", tmp_path / "saved", "docstrings"):
        error = refused(config_for(name, "  eval_split: test\n"))
        assert error.where == "run.yaml, line 5" and "has none" in error.message
