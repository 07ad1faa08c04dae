"""``pronghorn data preview``: what is shown is what training would take."""

from __future__ import annotations

import argparse
import json

import pytest

from pronghorn.cli import data_preview
from pronghorn.cli.rows import load_rows
from pronghorn.cli.train import training_settings
from pronghorn.config import parse_config
from pronghorn.data.checks.measure import Meter
from pronghorn.data.preview import preview_row
from pronghorn.data.rows import RowFormat, RowRenderer
from pronghorn.errors import (
    ChatTemplateMismatch,
    CommandMisused,
    RowInvalid,
    RowsUnreadable,
    TokenizerProblem,
)
from tests.data.chat_tokenizers import chat_tokenizer
from tests.tiny import tiny_tokenizer

CHAT = {
    "messages": [
        {"role": "user", "content": "Hi?\nYou?"},
        {"role": "assistant", "content": "日本."},
        {"role": "user", "content": "Bye?"},
        {"role": "assistant", "content": "Bye."},
    ]
}
ROWS = [CHAT, {"prompt": "a?", "completion": " b"}, {"text": "plain"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '\n{"messages": [\n')
    return path


def preview(*arguments) -> int:
    parser = argparse.ArgumentParser()
    data_preview.register(parser.add_subparsers())
    options = parser.parse_args(["preview", *map(str, arguments)])
    return options.run(options)


def test_marks_around_what_is_trained_on(rows, folder, capsys):
    assert preview(rows, "--tokenizer", folder) == 0
    shown = capsys.readouterr().out
    assert f"{rows}, line 1: chat, " in shown
    assert (
        "<|im_start|>user\nHi?\nYou?<|im_end|>\n<|im_start|>assistant\n⟦日本.<|im_end|>⟧\n<|im_start|>user\nBye?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Bye.<|im_end|>⟧\n" in shown
    )
    assert "warning: 2 of 2 trained parts end with '<|im_end|>', not with the EOS token '<|end|>'" in shown


def test_json_has_what_training_takes(rows, folder, capsys):
    assert preview(rows, "--tokenizer", folder, "--rows", 3, "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["kind"], line["row"], line["line"]) for line in lines] == [
        ("chat", 1, 1), ("prompt_completion", 2, 2), ("text", 3, 3),
    ]  # fmt: skip
    renderer = RowRenderer(tiny_tokenizer(), RowFormat(responses_only=True))
    for line, row in zip(lines, ROWS, strict=True):
        expected = renderer(row)
        assert (line["ids"], line["labels"]) == (expected["input_ids"], expected["labels"])
        assert len(line["tokens"]) == len(line["special"]) == len(line["ids"])
    assert "".join(lines[2]["tokens"]) == "plain<|end|>"
    assert [check["level"] for check in lines[1]["checks"]] == ["ok", "ok"]


TURNS = CHAT["messages"]


@pytest.mark.parametrize("all_tokens", [False, True])
@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        {"prompt": TURNS[:1], "completion": TURNS[1:2]},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"prompt": "a?", "completion": " b"},
        {"instruction": "a?", "input": "", "output": "b"},
        {"text": "plain"},
    ],
)
def test_shown_and_measured_is_what_the_command_trains_on(tmp_path, row, all_tokens):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    text = (
        f"model: {{name: tiny}}\ndata: {{dataset: {path}, responses_only: {str(not all_tokens).lower()}}}\n"
    )
    config = parse_config(text, "run.yaml")
    rows, tokenizer = load_rows(config), tiny_tokenizer()
    trained = RowRenderer(
        tokenizer,
        RowFormat(
            responses_only=config.data.responses_only and rows.are_chats,
            completion_only=training_settings(config).completion_only_loss,
        ),
    )(rows.train[0])
    shown = preview_row(row, tokenizer, responses_only=not all_tokens)
    assert (shown.ids, shown.labels) == (trained["input_ids"], trained["labels"])
    measured = Meter(tokenizer, responses_only=not all_tokens)(row, None)
    assert (measured.tokens, measured.supervised) == (len(shown.ids), shown.supervised)


def test_truncation_and_all_tokens(rows, folder, capsys):
    preview(rows, "--tokenizer", folder, "--max-seq-length", 30, "--json")
    cut = json.loads(capsys.readouterr().out)
    assert cut["tokens_kept"] == 30 < cut["tokens_in_all"]
    said = [check["text"] for check in cut["checks"] if "cut to 30" in check["text"]]
    total = sum(label != -100 for label in cut["labels"])
    assert said == [
        f"cut to 30 of {cut['tokens_in_all']} tokens: {total - cut['tokens_trained_on']} of {total} tokens to train on "
        "are lost" + (", and none is left" if not cut["tokens_trained_on"] else "")
    ]
    preview(rows, "--tokenizer", folder, "--max-seq-length", 30)
    shown = capsys.readouterr().out
    assert shown.count("⟨cut: ") == 2 and "⟩\n" in shown
    preview(rows, "--tokenizer", folder, "--all-tokens", "--json")
    everything = json.loads(capsys.readouterr().out)
    assert everything["labels"] == everything["ids"]


def test_another_template(rows, folder, tmp_path, capsys):
    preview(rows, "--tokenizer", folder, "--template", "vicuna")
    assert (
        "USER: Hi?\nYou? ASSISTANT:⟦ 日本.<|end|>⟧USER: Bye? ASSISTANT:⟦ Bye.<|end|>⟧"
        in capsys.readouterr().out
    )
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m['role'][0] + ': ' + m['content'] + eos_token }}{% endfor %}")
    preview(rows, "--tokenizer", folder, "--template", own)
    assert "u: Hi?\nYou?<|end|>⟦a: 日本.<|end|>⟧" in capsys.readouterr().out
    with pytest.raises(ChatTemplateMismatch, match="start_header_id"):
        preview(rows, "--tokenizer", folder, "--template", "llama-3")


def test_mistakes_name_the_line(rows, folder, tmp_path):
    with pytest.raises(CommandMisused, match=r"no row 9.*has 4"):
        preview(rows, "--tokenizer", folder, "--row", 9)
    with pytest.raises(RowsUnreadable, match="line 5"):
        preview(rows, "--tokenizer", folder, "--row", 4)
    with pytest.raises(CommandMisused, match="no file"):
        preview(tmp_path / "none.jsonl", "--tokenizer", folder)
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"a": 1}\n')
    with pytest.raises(RowInvalid, match=r"no known kind.*line 1"):
        preview(odd, "--tokenizer", folder)
    tiny_tokenizer(chat_template=False).save_pretrained(tmp_path / "base")
    with pytest.raises(TokenizerProblem, match="--template chatml"):
        preview(rows, "--tokenizer", tmp_path / "base")


def checks(row, tokenizer) -> dict[str, str]:
    return {check.text: check.level for check in preview_row(row, tokenizer).checks}


def test_beginnings():
    twice = chat_tokenizer("llama-3")
    assert (
        checks({"text": "<|begin_of_text|>" * 2 + "a"}, twice)["begins with '<|begin_of_text|>' 2 times"]
        == "warning"
    )
    assert checks({"text": "a"}, twice)["begins with '<|begin_of_text|>', the BOS token"] == "ok"
    twice.chat_template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    missing = "does not begin with '<|begin_of_text|>', which this tokenizer puts before every text"
    assert checks(CHAT, twice)[missing] == "warning"


def test_control_tokens_of_another_model():
    found = checks({"text": "a <|eot_id|> b"}, tiny_tokenizer())
    (text,) = [text for text in found if "eot_id" in text]
    assert (
        text.startswith("'<|eot_id|>' is no token of this tokenizer: it becomes ")
        and found[text] == "warning"
    )


def test_nothing_to_train_on():
    found = checks({"messages": CHAT["messages"][:1]}, tiny_tokenizer())
    assert found["no token is trained on"] == "warning"


def test_colours(rows, folder, monkeypatch, capsys):
    monkeypatch.setattr(data_preview, "is_terminal", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    preview(rows, "--tokenizer", folder)
    shown = capsys.readouterr().out
    assert "\x1b[30;42m日本.\x1b[0m\x1b[1;35;42m<|im_end|>" in shown
    assert "Hi?↵" in shown
