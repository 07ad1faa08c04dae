"""The command: quick help, one line for a user's mistake, exit statuses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pronghorn.cli import main as command
from pronghorn.errors import PackageMissing

SOURCES = str(Path(__file__).resolve().parents[2] / "src")


def run(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess:
    start = ["-c", code] if code else ["-m", "pronghorn.cli"]
    environment = {**os.environ, "PYTHONPATH": SOURCES}
    return subprocess.run(
        [sys.executable, *start, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=120,
    )


def test_help_names_every_command_and_imports_no_torch():
    code = (
        "import sys; from pronghorn.cli.main import build_parser\n"
        "print(build_parser().format_help()); sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    )
    result = run(code=code)
    assert result.returncode == 0
    for name in ("train", "quickstart", "chat", "doctor"):
        assert name in result.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        command.main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out.startswith("pronghorn 0.")


def test_reading_a_wrong_configuration_is_one_line_and_status_2(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model:\n  nam: x\ndata:\n  dataset: docstrings\n")
    result = run("train", str(config))
    assert result.returncode == 2
    assert result.stderr == (
        f"pronghorn: [PH401] unknown key 'nam' under 'model' ({config}, line 2). Fix: did you mean 'name'?\n"
    )


def test_unknown_command():
    result = run("trian")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [["quickstart", "--steps", "0"], ["chat", "m", "--temperature", "-1"]])
def test_numbers_are_checked(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert "must be at least" in capsys.readouterr().err


def test_interrupt_is_a_line_and_130(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_commands", lambda: {"doctor": interrupted})
    assert command.main(["doctor"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_user_error_is_a_line_and_2(monkeypatch, capsys):
    def failing(options):
        raise PackageMissing("no model here", fix="install it")

    monkeypatch.setattr(command, "_commands", lambda: {"doctor": failing})
    assert command.main(["doctor"]) == 2
    assert capsys.readouterr().err == "pronghorn: [PH403] no model here. Fix: install it\n"


def test_a_reader_that_leaves_is_no_error():
    result = subprocess.run(
        f"{sys.executable} -m pronghorn.cli doctor | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCES},
        check=False,
        timeout=120,
    )
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr
