"""`pronghorn data` as a user runs it: tables, JSON, exit statuses, files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pronghorn.cli.main import main
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CHAT = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def sound(tmp_path):
    return write(tmp_path / "sound.jsonl", CHAT, {"messages": [*CHAT["messages"], *CHAT["messages"]]})


@pytest.fixture
def broken(tmp_path):
    return write(tmp_path / "broken.jsonl", CHAT, str(CHAT), '{"messages": [', {"messages": []})


@pytest.fixture
def tokenizer(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_check_says_what_is_wrong_and_where(sound, broken, capsys):
    assert main(["data", "check", sound]) == 0
    printed = capsys.readouterr().out
    assert "messages (ChatML)" in printed and "No problems." in printed
    assert main(["data", "check", broken, "--fail-on", "error"]) == 1
    printed = capsys.readouterr().out
    for expected in (
        f"{broken}:2: [single-quotes]",
        f"{broken}:3: [truncated]",
        f"{broken}:4: [empty-field] messages: 'messages' holds no messages",
        "pronghorn data clean",
    ):
        assert expected in printed
    assert main(["data", "check", broken, "--limit", "1"]) == 1
    assert "..." not in capsys.readouterr().out.split("Problems")[1].split("broken")[0]


def test_check_as_json_and_its_statuses(sound, broken, tmp_path, capsys):
    assert main(["data", "check", broken, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"single-quotes": 1, "truncated": 1, "empty-field": 1, "duplicate": 1}
    assert {"file", "line", "kind", "what", "fix"} <= found["findings"][0].keys()
    twice = write(tmp_path / "twice.jsonl", CHAT, CHAT)
    assert main(["data", "check", twice]) == 1
    assert main(["data", "check", twice, "--fail-on", "error"]) == 0
    for arguments in (["absent.jsonl"], [sound, "--max-seq-length", "8"], [sound, "--encoding", "hex"]):
        capsys.readouterr()
        assert main(["data", "check", *arguments]) == 2
        assert "Fix: " in capsys.readouterr().err


def test_check_with_a_tokenizer_and_a_page(sound, tokenizer, tmp_path, capsys):
    page = tmp_path / "page.html"
    arguments = ["--tokenizer", tokenizer, "--max-seq-length", "20", "--html", str(page)]
    assert main(["data", "check", sound, *arguments]) == 1
    printed = capsys.readouterr().out
    assert "[too-long]" in printed and str(page) in printed and "tokens" in printed
    assert "tokens of a row" in page.read_text()
    assert main(["data", "check", sound, "--tokenizer", str(tmp_path / "absent")]) == 2


def test_clean(broken, tmp_path, capsys):
    target = tmp_path / "out.jsonl"
    assert main(["data", "clean", broken, str(target), "--dedup"]) == 0
    printed = capsys.readouterr().out
    assert "repaired: single-quotes" in printed and "rejected: truncated" in printed
    assert "out.rejected.jsonl" in printed
    assert [json.loads(line) for line in target.read_text().splitlines()] == [CHAT]
    assert main(["data", "clean", broken, str(target)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["data", "clean", broken, str(target), "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows_out"] == 2
    assert main(["data", "clean", str(target), str(tmp_path / "again.jsonl")]) == 0
    assert "Nothing had to be repaired" in capsys.readouterr().out
    nothing = write(tmp_path / "nothing.jsonl", "[1]")
    assert main(["data", "clean", nothing, str(target), "--force"]) == 1, "no row is left"


def test_stats(sound, tokenizer, capsys):
    assert main(["data", "stats", sound, "--tokenizer", tokenizer, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Advised: max_seq_length 64" in printed and "padding, packed" in printed
    assert main(["data", "stats", sound, "--tokenizer", tokenizer, "--json", "--max-seq-length", "20"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 2 and found["max_seq_length"] == 20 and found["rows_cut"] >= 1


def test_escapes_in_the_data_do_not_reach_the_terminal(tmp_path, capsys):
    evil = "\x1b[2J\x07\u202e"
    write(tmp_path / "evil.jsonl", {"text": evil}, {evil: 1}, "{" + evil)
    assert main(["data", "check", str(tmp_path / "evil.jsonl")]) == 1
    printed = capsys.readouterr().out
    assert not set(evil) & set(printed) - {"[", "2", "J"}


def test_checking_and_cleaning_need_no_torch(broken, tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'src'); from pronghorn.cli.main import main\n"
        f"main(['data', 'check', {broken!r}]); main(['data', 'clean', {broken!r}, {str(tmp_path / 'o.jsonl')!r}])\n"
        "import pronghorn.data; pronghorn.data.check, pronghorn.data.clean\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'heavy'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
