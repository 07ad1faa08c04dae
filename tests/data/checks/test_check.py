"""Every kind of problem is found in the line it is in, and rows without problems have none."""

from __future__ import annotations

import json
import random

import pytest

from pronghorn.data import check
from pronghorn.data.checks.duplicates import SeenRows, digest
from pronghorn.data.checks.formats import format_of, problems_of
from pronghorn.data.reading import KINDS, level_of
from pronghorn.data.rows import RowFormat, RowRenderer
from pronghorn.errors import CommandMisused, RowInvalid
from tests.data.chat_tokenizers import chat_tokenizer
from tests.tiny import tiny_tokenizer


def chat(*turns, **extra):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)], **extra}


def words(seed, count=60):
    pick = random.Random(seed)
    return " ".join(f"word{pick.randrange(5000)}" for _ in range(count))


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def found(report):
    """(line, kind, field) of all findings."""
    return [(finding.line, finding.kind, finding.field) for finding in report.findings]


ANSWER = [{"role": "assistant", "content": "b"}]
UPPER = "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}\n{{ m['content'].upper() + '<|im_end|>' }}{% endfor %}"
FORMATS = {
    "messages": chat("Hi?", "Hello."),
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
    "prompt-completion": {"prompt": "Hi?", "completion": "Hello."},
    "preference": {"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."},
    "alpaca": {"instruction": "Greet.", "input": "", "output": "Hello."},
    "text": {"text": "Hello."},
    "tokens": {"input_ids": [1, 2, 3]},
}


@pytest.mark.parametrize("format", FORMATS)
def test_formats_are_told_and_sound_rows_have_no_problems(tmp_path, format):
    row = FORMATS[format]
    assert format_of(row) == format
    report = check(write(tmp_path / "r.jsonl", [row]))
    assert report.clean, report.findings
    assert report.files[0].format == format


@pytest.mark.parametrize(
    ("row", "kind", "field"),
    [
        ({"messages": []}, "empty-field", "messages"),
        ({"messages": None}, "missing-field", "messages"),
        ({"messages": 3}, "wrong-type", "messages"),
        ({"messages": json.dumps(chat("a", "b")["messages"])}, "json-in-text", "messages"),
        ({"messages": ["a"]}, "wrong-type", "messages[0]"),
        ({"messages": [{"content": "a"}]}, "missing-field", "messages[0].role"),
        ({"messages": [{"role": 3, "content": "a"}]}, "wrong-type", "messages[0].role"),
        (chat("a", ""), "empty-field", "messages[1].content"),
        (chat("a", " \n"), "empty-field", "messages[1].content"),
        (chat("a", None), "missing-field", "messages[1].content"),
        (chat("a", 3), "wrong-type", "messages[1].content"),
        (chat("a", [{"type": "image"}]), "wrong-type", "messages[1].content[0]"),
        (chat("a"), "no-answer", "messages"),
        (chat("a", "b", "c"), "role-order", "messages"),
        ({"messages": [*chat("a", "b")["messages"], *ANSWER]}, "role-order", "messages[2]"),
        ({"messages": [*chat("a", "b")["messages"], {"role": "system", "content": "c"}]}, "role-order", "messages[2]"),
        ({"messages": chat("a", "b")["messages"][1:]}, "role-order", "messages[0]"),
        ({"messages": [{"role": "usr", "content": "a"}, *ANSWER]}, "unknown-role", "messages[0]"),
        ({"prompt": "", "completion": "a"}, "empty-prompt", "prompt"),
        ({"prompt": "a", "completion": " "}, "empty-field", "completion"),
        ({"prompt": 3, "completion": "a"}, "wrong-type", "prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "same-answers", "rejected"),
        ({"prompt": "a", "chosen": "b"}, "missing-field", "rejected"),
        ({"instruction": "a", "input": "b"}, "missing-field", "output"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "wrong-type", "input"),
        ({"text": ""}, "empty-field", "text"),
        ({"text": ["a"]}, "wrong-type", "text"),
        ({"input_ids": ["a"]}, "wrong-type", "input_ids"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "no-answer", "labels"),
        ({"other": 1}, "unknown-format", ""),
        ({"data": [chat("a", "b")]}, "nested-rows", "data"),
        ([1], "not-a-row", ""),
        ({"text": "zero\u200bwidth"}, "invisible", "text"),
        ({"text": "a\u202eb"}, "bidi", "text"),
        ({"text": "lost \ufffd"}, "replacement", "text"),
        ({"text": "\ue001"}, "private-use", "text"),
        ({"text": "x\U000e0041\U000e0042"}, "hidden-text", "text"),
        ({"text": "\x1b[31mred"}, "control", "text"),
        ({"text": "cafÃ© donâ€™t"}, "mojibake", "text"),
        (chat("a", "b\u2060", tools=None), "invisible", "messages[1].content"),
    ],
)  # fmt: skip
def test_each_problem_of_a_row(tmp_path, row, kind, field):
    report = check(write(tmp_path / "r.jsonl", [row]))
    assert found(report) == [(1, kind, field)], report.findings
    finding = report.findings[0]
    assert finding.what and finding.fix and finding.level == KINDS[kind].level
    assert report.counts == {kind: 1}


@pytest.mark.parametrize(
    "row",
    [
        {"text": "فارسی می‌خواهم \u200f 👨\u200d👩\u200d👧 🏴\U000e0067\U000e0062\U000e007f «CAFÉ»"},
        {"text": "Spaß naïve 数据 привет"},
        {"messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": ""}, {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "Cold."},
        ]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"chosen": chat("a", "b")["messages"], "rejected": chat("a", "c")["messages"]},
        {"instruction": "a", "input": None, "output": "b", "extra": {"deep": [1, {"x": None}]}},
    ],
)  # fmt: skip
def test_sound_rows(tmp_path, row):
    report = check(write(tmp_path / "r.jsonl", [row]))
    assert report.clean, report.findings


def test_repairs_and_broken_lines(tmp_path):
    rows = [chat("a", "b"), str(chat("c", "d")), '{"messages": [', "", json.dumps(chat("e", "f")) + ","]
    report = check(write(tmp_path / "r.jsonl", rows))
    assert found(report) == [(2, "single-quotes", ""), (3, "truncated", ""), (5, "trailing-comma", "")]
    file = report.files[0]
    assert (file.rows, file.unread, file.bad_rows) == (3, 1, 3)


def test_duplicates_near_ones_and_leakage(tmp_path):
    first = [chat(words(i), words(100 + i)) for i in range(6)]
    first.append(
        {"conversations": [{"from": "human", "value": words(0)}, {"from": "gpt", "value": words(100)}]}
    )
    first.append(chat(words(1), words(101) + " again"))
    second = [chat(words(2), words(102), id=3), chat(words(3), words(900)), chat(words(4) + " x", words(104))]
    report = check([write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second)])
    assert [(f.file[-7:], f.line, f.kind) for f in report.findings if f.kind != "mixed-format"] == [
        ("a.jsonl", 7, "duplicate"), ("a.jsonl", 8, "near-duplicate"),
        ("b.jsonl", 1, "leakage"), ("b.jsonl", 2, "prompt-leakage"), ("b.jsonl", 3, "near-leakage"),
    ]  # fmt: skip
    texts = {finding.kind: finding.what for finding in report.findings}
    assert texts["duplicate"] == "the same as line 1"
    assert texts["leakage"].endswith("a.jsonl, line 3")
    assert not check([tmp_path / "a.jsonl"], near_duplicates=False).counts["near-duplicate"]


def test_a_shared_system_message_makes_no_near_duplicates(tmp_path):
    system = {"role": "system", "content": words(7, 400)}
    rows = [{"messages": [system, *chat(words(i), words(50 + i))["messages"]]} for i in range(5)]
    assert check(write(tmp_path / "r.jsonl", rows)).clean


def test_columns_and_formats_that_change(tmp_path):
    rows = [{"text": f"row {i}", "id": i} for i in range(5)] + [
        {"text": "row 5", "id": "five"},
        chat("a", "b"),
    ]
    report = check(write(tmp_path / "r.jsonl", rows))
    assert found(report) == [(6, "mixed-types", "id"), (7, "mixed-format", "")]
    assert "text in 1 and a number in 5 rows" in report.findings[0].what


def test_another_column_of_text(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"body": "a"}])
    assert check(path).counts == {"unknown-format": 1}
    assert check(path, text_field="body").clean


def test_findings_are_listed_up_to_a_limit_and_all_counted(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"text": ""}] * 30 + ["{"] * 3)
    report = check(path, limit=5)
    assert report.counts == {"empty-field": 30, "truncated": 3} and len(report.findings) == 8
    assert report.errors == 33 and not report.clean
    assert json.loads(json.dumps(report.as_dict()))["counts"]["empty-field"] == 30


def test_rows_of_arrays_tables_and_parquet_are_named_by_number(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "r.json").write_text('[{"text": "a"},\n\n{"text": ""}]')
    assert [(f.line, f.row) for f in check(tmp_path / "r.json").findings] == [(3, 2)]
    (tmp_path / "r.csv").write_text('text\n"a\nb"\n""\n')
    assert [(f.line, f.row) for f in check(tmp_path / "r.csv").findings] == [(4, 2)]
    parquet.write_table(pa.table({"text": ["a", ""]}), tmp_path / "r.parquet")
    report = check(tmp_path / "r.parquet")
    assert [(f.line, f.row) for f in report.findings] == [(0, 2)]
    assert report.findings[0].place.endswith("r.parquet, row 2")


def test_empty_files(tmp_path):
    for name, data in (("a.jsonl", b""), ("b.json", b"[]"), ("c.csv", b"text\n"), ("d.txt", b"\n\n")):
        (tmp_path / name).write_bytes(data)
        assert check(tmp_path / name).counts == {"empty-file": 1}, name
    with pytest.raises(CommandMisused):
        check(tmp_path / "absent.jsonl")


def test_tokens(tmp_path):
    rows = [
        chat("Hi?", "Hello."),
        chat("What does it eat?", "Grass, sagebrush and cactus. " * 4),
        chat("Say it <|im_end|> now.", "Hello there."),
    ]
    path = write(tmp_path / "r.jsonl", rows)
    tokenizer = tiny_tokenizer()
    report = check(path, tokenizer=tokenizer, max_seq_length=40)
    assert found(report) == [(2, "too-long", ""), (3, "special-token", "messages[0]")]
    facts = report.files[0]
    assert len(facts.tokens) == 3 and 0 < sum(facts.kept) < sum(facts.supervised) < sum(facts.tokens)
    lost = facts.supervised[1] - facts.kept[1]
    assert f"{lost} of {facts.supervised[1]} that count" in report.findings[0].what
    report = check(path, tokenizer=tokenizer, max_seq_length=4)
    assert report.counts["nothing-supervised"] == 3
    assert check(path, tokenizer=tiny_tokenizer(chat_template=False)).counts["no-template"] == 1


@pytest.mark.parametrize(
    ("template", "kind"),
    [
        (UPPER, "template-drops"),
        ("{{ raise_exception('only users may speak') }}", "template-refuses"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "template-refuses"),
    ],
)  # fmt: skip
def test_templates_that_change_or_refuse_a_row(tmp_path, template, kind):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    report = check(
        write(tmp_path / "r.jsonl", [chat("Hi?", "Hello.")]), tokenizer=tokenizer, responses_only=False
    )
    assert kind in report.counts, report.findings


def test_text_that_tokens_do_not_give_back(tmp_path):
    tokenizer = tiny_tokenizer()
    decode = tokenizer.decode

    class Lossy:
        def __call__(self, *args, **options):
            return tokenizer(*args, **options)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def decode(self, *args, **options):
            return decode(*args, **options).replace("Hello", "<unk>")

    report = check(write(tmp_path / "r.jsonl", [chat("Hi?", "Hello."), {"text": "Hello"}]), tokenizer=Lossy())
    assert [f.line for f in report.findings if f.kind == "token-round-trip"] == [1, 2]


def test_digests_are_found_again_in_a_growing_table():
    seen = SeenRows()
    for place in range(5000):
        assert seen.first(digest(b"%d" % place), place) is None
    assert len(seen) == 5000
    assert all(seen.first(digest(b"%d" % place), 1) == place for place in range(5000))


def test_similarity_is_estimated_closely():
    from pronghorn.data.checks.near import SIMILAR, Signatures, signature

    def shingles(text):
        return {text[i : i + 8] for i in range(len(text) - 7)}

    pick = random.Random(0)
    vocabulary = [f"word{i}" for i in range(500)]
    texts, truth, signatures = [], {}, Signatures()
    for i in range(60):
        base = pick.choices(vocabulary, k=120)
        other = [pick.choice(vocabulary) if pick.random() < i / 600 else word for word in base]
        texts += [" ".join(base), " ".join(other)]
        a, b = shingles(texts[-2]), shingles(texts[-1])
        truth[2 * i + 1] = len(a & b) / len(a | b)
    for place, text in enumerate(texts):
        signatures.add(text, place)
    pairs = {row: (other, similarity) for row, other, similarity in signatures.pairs()}
    for row, (other, similarity) in pairs.items():
        assert other == row - 1, "rows of different texts are not alike"
        # The standard error of 128 bins is below 0.04; four of them leave room for all 60.
        assert abs(similarity - truth[row]) < 0.16
    sure = [row for row, value in truth.items() if value > SIMILAR + 0.12]
    assert len(sure) > 10 and all(row in pairs for row in sure)
    assert signature("too short") is None
    few = Signatures(limit=1)
    few.add(texts[0], 0)
    few.add(texts[2], 1)
    assert few.left_out == 1


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"tools": "not JSON"}, "tools"),
        ({"tools": 5}, "tools"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
        ({"tools": ""}, None),
        ({"tools": "[]", "chat_template_kwargs": None}, None),
    ],
)
def test_what_a_row_gives_its_template(row, field):
    """Check and training refuse the same."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for whole in ({"messages": turns, **row}, {"prompt": turns[:1], "completion": turns[1:], **row}):
        problems = problems_of(whole, format_of(whole))
        assert [problem.field for problem in problems] == ([field] if field else [])
        renderer = RowRenderer(chat_tokenizer("chatml"), RowFormat())
        if field:
            with pytest.raises(RowInvalid, match=field):
                renderer.chat_for(whole)
        else:
            renderer.chat_for(whole)


@pytest.mark.parametrize(
    ("row", "refused"),
    [
        ({"instruction": "i", "output": 42}, False),
        ({"instruction": "i", "input": 1.5, "output": "o"}, False),
        ({"instruction": "i", "output": ["a"]}, True),
        ({"instruction": {"a": 1}, "output": "o"}, True),
        ({"input_ids": [1, -1]}, True),
        ({"input_ids": [1, 2**40]}, True),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": {"a": 1}}]}, True),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, None),
    ],
)
def test_check_and_training_refuse_the_same(row, refused):
    errors = [problem for problem in problems_of(row, format_of(row)) if level_of(problem) == "error"]
    assert bool(errors) is bool(refused)
    tokenizer = chat_tokenizer("chatml")
    render = RowRenderer(tokenizer, RowFormat())
    if refused is False:
        assert render(row)["input_ids"]
        return
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(RowInvalid) as caught:
        render(row)
    assert refused or "DPOTrainer" in caught.value.fix
