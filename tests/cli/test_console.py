"""Tables are plain and aligned when piped, and durations read well."""

import pytest

from pronghorn.cli.console import duration, table, typed_command, wrapped


def test_plain_table(capsys):
    table("Title", ("a", "long name"), [("x", 1), ("yyyy", 2.5)])
    assert capsys.readouterr().out == "\nTitle\n  a     long name\n  x     1\n  yyyy  2.5\n"


def test_terminal_table_keeps_square_brackets(monkeypatch, capsys):
    monkeypatch.setattr("pronghorn.cli.console.is_terminal", lambda: True)
    table("Title", ("fix",), [("pip install 'pronghorn[gpu]'",)])
    assert "[gpu]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.04, "0.0 s"), (8.13, "8.1 s"), (59.94, "59.9 s"), (200, "3 min 20 s")]
)
def test_duration(seconds, shown):
    assert duration(seconds) == shown


def test_wrapped_indents_each_line():
    assert wrapped("one two\nthree", "  ", 8) == "  one\n  two\n  three"


def test_the_command_as_it_can_be_typed(tmp_path, monkeypatch):
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "pronghorn").touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(programs / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert typed_command() == ".venv/bin/pronghorn"
    monkeypatch.setenv("PATH", str(programs))
    assert typed_command() == "pronghorn"
