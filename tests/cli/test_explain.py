"""``pronghorn explain``, and what the command prints for exceptions of other libraries."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pronghorn.cli import main as command
from pronghorn.cli import unexpected
from pronghorn.errors import PackageMissing


@pytest.mark.parametrize("word", ["PH401", "ph401", "ConfigInvalid"])
def test_a_code(word, capsys):
    assert command.main(["explain", word, "--lang", "en"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("PH401 ConfigInvalid\n") and "Cause" in text and "Fix" in text


def test_chinese(capsys, monkeypatch):
    assert command.main(["explain", "PH501", "--lang", "zh"]) == 0
    assert "显存不足" in capsys.readouterr().out
    for name in ("LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert command.main(["explain", "PH501"]) == 0
    assert "原因" in capsys.readouterr().out


@pytest.mark.parametrize("split", [False, True])
def test_a_pasted_error(split, capsys):
    text = "RuntimeError: CUDA error: invalid configuration argument"
    assert command.main(["explain", "--lang", "en", *(text.split() if split else [text])]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("[PH506]") and "VersionMismatch" in printed


def test_all_of_them(capsys):
    assert command.main(["explain", "--lang", "en"]) == 0
    text = capsys.readouterr().out
    assert "PH101" in text and "PH701" in text


def test_an_unknown_text_is_status_1(capsys):
    assert command.main(["explain", "ValueError: forty-two"]) == 1
    assert "report" in capsys.readouterr().out


def test_an_unknown_code(capsys):
    assert command.main(["explain", "PH499"]) == 2
    assert re.search(r"no error PH499\. Fix: one of PH", capsys.readouterr().err)


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """The command `doctor`, raising what is given; tracebacks go to a folder of the test."""
    monkeypatch.setattr(unexpected.tempfile, "gettempdir", lambda: str(tmp_path))

    def give(error: Exception) -> None:
        def run(options):
            raise error

        monkeypatch.setattr(command, "_commands", lambda: {"doctor": run})

    return give


def test_a_known_exception_of_another_library(failing, capsys, tmp_path):
    failing(RuntimeError("expected mat1 and mat2 to have the same dtype, but got: c10::Half != float"))
    assert command.main(["doctor"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("pronghorn: [PH206] tensors of two dtypes met in one product. Fix: ")
    assert "Traceback" not in said and "pronghorn explain PH206" in said
    (log,) = tmp_path.iterdir()
    assert str(log) in said and "c10::Half" in log.read_text() and "Traceback" in log.read_text()


def test_an_unknown_exception_says_how_to_report(failing, capsys, tmp_path):
    failing(ValueError("forty-two\nmore"))
    assert command.main(["doctor"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("pronghorn: unexpected ValueError: forty-two\n")
    assert "report" in said and "Traceback" not in said and str(next(tmp_path.iterdir())) in said


def test_without_a_place_for_the_traceback(failing, capsys, monkeypatch):
    monkeypatch.setattr(unexpected.tempfile, "gettempdir", lambda: "/no/such/folder")
    failing(ValueError("forty-two"))
    assert command.main(["doctor"]) == 1
    assert "--debug" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("forty-two"), PackageMissing("no model here")])
def test_debug_shows_the_traceback(failing, error):
    failing(error)
    with pytest.raises(type(error)):
        command.main(["doctor", "--debug"])


def test_a_secret_on_the_command_line_is_not_written(failing, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["pronghorn", "train", "--set", "model.token=hf_secret"])
    failing(ValueError("forty-two"))
    command.main(["doctor"])
    assert "hf_secret" not in Path(next(tmp_path.iterdir())).read_text()
