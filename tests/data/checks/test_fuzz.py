"""Mutated files: nothing raises, and no row disappears without being counted.

FUZZ_LINES=100000 python -m pytest -q tests/data/checks/test_fuzz.py --timeout=3600
"""

from __future__ import annotations

import base64
import json
import os
import re

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pronghorn.data import check, clean
from pronghorn.data.checks.page import page
from pronghorn.data.reading import KINDS, RowFile, parse
from pronghorn.data.reading import lines as lines_module

LINES = int(os.environ.get("FUZZ_LINES", "3000"))
LINES_A_FILE = 20
EXAMPLES = max(LINES // LINES_A_FILE, 1)
#: Each file is looked at by two tests of mutated files.
SETTINGS = settings(
    max_examples=max(EXAMPLES // 2, 1),
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)

SOUND = [
    {
        "messages": [
            {"role": "user", "content": 'Say "hi" \\ \n é'},
            {"role": "assistant", "content": "It's 数据 😀"},
        ]
    },
    {"conversations": [{"from": "human", "value": "a, {b}: [c]"}, {"from": "gpt", "value": "// d # e /* f"}]},
    {"instruction": "Add.", "input": "1, 2", "output": "3", "n": [1.5, -2e3, None, True, {"deep": {}}]},
    {"prompt": "Why?", "completion": "Because."},
    {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    {"text": "Plain\ttext"},
]
LINES_OF_SOUND = [json.dumps(row, ensure_ascii=ascii).encode() for row in SOUND for ascii in (False, True)]
TOKENS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"'", b"\\", b"\n", b"\r", b"\r\n", b"\t", b"\x00", b"\x1b", b"//", b"#",
    b"/*", b"None", b"True", b"NaN", b"-Infinity", b"null", b"1e999", b"-", b"0", b"\xef\xbb\xbf", b"\xff", b"\xe9",
    b"\xff\xfe", b"\\u", b"\\ud83d", b"\\x41", b"\xed\xa0\x80", "\u202e\u200b\ufffd".encode(), b'{"a": 1}',
    b'"text": 3,', b'"role"', b"[" * 200, b"9" * 5000,
]  # fmt: skip

#: What no terminal should be told: control characters, and those that turn the reading order.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

positions = st.integers(0, 400)
changes = st.one_of(
    st.tuples(st.just("insert"), positions, st.sampled_from(TOKENS)),
    st.tuples(st.just("insert"), positions, st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("delete"), positions, st.integers(1, 40)),
    st.tuples(st.just("cut"), positions, st.just(0)),
    st.tuples(st.just("quotes"), st.just(0), st.just(0)),
    st.tuples(st.just("twice"), positions, st.integers(1, 40)),
)
mutated = st.tuples(st.sampled_from(LINES_OF_SOUND), st.lists(changes, min_size=0, max_size=3))
files = st.lists(mutated, min_size=LINES_A_FILE, max_size=LINES_A_FILE)


def changed(line: bytes, how) -> bytes:
    kind, at, what = how
    at = min(at, len(line))
    if kind == "insert":
        return line[:at] + what + line[at:]
    if kind == "delete":
        return line[:at] + line[at + what :]
    if kind == "cut":
        return line[:at]
    if kind == "quotes":
        return line.replace(b'"', b"'")
    return line[:at] + line[at : at + what] * 2 + line[at + what :]


def lines_of(drawn) -> list[tuple[bytes, bool]]:
    """(line, whether it is as it was)."""
    lines = []
    for line, hows in drawn:
        result = line
        for how in hows:
            result = changed(result, how)
        lines.append((result, result == line))
    return lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def checked(path):
    """A check that raised nothing, whose result can be told and shown."""
    report = check(path, near_duplicates=False, limit=50)
    text = json.dumps(report.as_dict())
    assert "Traceback" not in text
    for finding in report.findings:
        assert finding.kind in KINDS and finding.what and finding.fix and finding.file == str(path)
        assert not UNSEEN.search(finding.what + finding.field)
    shown = page(report)
    assert shown.encode("utf-8") and shown.count("<script") == 0
    return report


def cleaned(source, folder):
    """A cleaning that keeps its promises; (the result, rows written, texts of rejected rows)."""
    target = folder / "out.jsonl"
    result = clean(source, target, force=True)
    assert result.rows_in == result.rows_out + result.rows_rejected
    data = target.read_bytes()
    rows = [json.loads(line.decode(), parse_constant=pytest.fail) for line in data.splitlines()]
    assert len(rows) == result.rows_out and all(isinstance(row, dict) for row in rows)
    again = clean(target, folder / "again.jsonl", force=True)
    assert (folder / "again.jsonl").read_bytes() == data
    assert not again.repairs and not again.rejected
    errors = [f for f in check(target, near_duplicates=False).findings if f.level == "error"]
    assert {finding.kind for finding in errors} <= {"mixed-types", "empty-file"}, errors
    rejected = []
    if result.rejected_file:
        with open(result.rejected_file, "rb") as kept:
            rejected = [json.loads(line) for line in kept]
    assert len(rejected) == result.rows_rejected
    return result, rows, [original(row) for row in rejected]


def original(row) -> bytes:
    return row["original"].encode() if "original" in row else base64.b64decode(row["original_base64"])


@SETTINGS
@given(drawn=files)
def test_mutated_json_lines(folder, drawn):
    path = folder / "rows.jsonl"
    lines = lines_of(drawn)
    path.write_bytes(b"\n".join(line for line, _ in lines))
    checked(path)
    _, rows, rejected = cleaned(path, folder)
    if path.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff") or RowFile(path).container != "JSON Lines":
        return  # a mark, or brackets that go over lines, make another text of the file
    kept = {json.dumps(row, sort_keys=True) for row in rows}
    written = (folder / "out.jsonl").read_bytes().splitlines()
    for line, sound in lines:
        if sound and line in written:
            continue  # copied byte for byte
        if sound:  # a broken line before it may have taken it in
            row = json.dumps(json.loads(line), sort_keys=True)
            assert row in kept or any(line in kept_aside for kept_aside in rejected), line


@SETTINGS
@given(drawn=files, suffix=st.sampled_from([".json", ".csv", ".txt", ".parquet", ".tsv"]))
def test_mutated_files_of_other_kinds(folder, drawn, suffix):
    path = folder / f"rows{suffix}"
    lines = [line for line, _ in lines_of(drawn)]
    start, between, end = {".json": (b"[", b",\n", b"]"), ".csv": (b"text,b\n", b"\n", b"")}.get(
        suffix, (b"", b"\n", b"")
    )
    path.write_bytes(start + between.join(lines) + end)
    report = checked(path)
    if report.counts.keys() & {"unreadable", "long-line"}:
        return  # cleaning refuses such a file as a whole
    cleaned(path, folder)


@SETTINGS
@given(data=st.binary(max_size=300), size=st.integers(1, 50))
def test_any_bytes_in_pieces_of_any_size(folder, data, size):
    before, lines_module.CHUNK = lines_module.CHUNK, max(size, 4)
    try:
        for suffix in (".jsonl", ".json", ".csv", ".txt"):
            path = folder / f"bytes{suffix}"
            path.write_bytes(data)
            checked(path)
    finally:
        lines_module.CHUNK = before


@SETTINGS
@given(text=st.text(max_size=200), hows=st.lists(changes, max_size=3))
def test_what_is_repaired_is_json_with_the_same_texts(text, hows):
    line = json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "surrogatepass")
    for how in hows:
        line = changed(line, how)
    parsed = parse(line)
    assert (parsed.problem is None) or not parsed.values
    if parsed.texts is None:
        assert parsed.problem or parsed.values == [json.loads(line)]
        return
    for repaired, value in zip(parsed.texts, parsed.values, strict=True):
        assert json.loads(repaired) == value
        assert parse(repaired.encode()).texts is None
