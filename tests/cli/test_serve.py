"""`pronghorn serve`: arguments, what refuses to start, and a server that runs and stops as a process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from pronghorn.cli import serve
from pronghorn.cli.arguments import read_adapters
from pronghorn.cli.main import main
from pronghorn.errors import CommandMisused
from tests.tiny import save_tiny

SOURCES = Path(__file__).resolve().parents[2] / "src"


def test_adapters_have_names():
    assert read_adapters(["a=x", "b.2=y=z"]) == {"a": "x", "b.2": "y=z"}


@pytest.mark.parametrize("given", [["x"], ["=x"], ["a="], ["a=x", "a=y"]])
def test_adapters_without_names(given):
    with pytest.raises(CommandMisused):
        read_adapters(given)


def test_others_need_a_token(monkeypatch, capsys):
    monkeypatch.delenv(serve.TOKEN_VARIABLE, raising=False)
    assert main(["serve", "nowhere", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "[PH810]" in capsys.readouterr().err


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "nowhere", "--port", str(taken.getsockname()[1])]) == 2
    assert "another --port" in capsys.readouterr().err
    assert main(["serve", "nowhere", "--port", "70000"]) == 2


@pytest.mark.parametrize("origin", ["*", "chat.example.org", "https://chat.example.org/", "ftp://a"])
def test_origins_that_are_none(origin, capsys):
    assert main(["serve", "nowhere", "--allow-origin", origin]) == 2
    assert "no web origin" in capsys.readouterr().err


def test_a_model_that_is_not_there_ends_it(capsys):
    assert main(["serve", "./nowhere", "--port", "0"]) == 2
    assert "[PH101]" in capsys.readouterr().err


def test_what_to_install(monkeypatch, capsys):
    real = serve.find_spec
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else real(name))
    assert main(["serve", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert "needs uvicorn" in said and "pip install 'pronghorn[serve]'" in said


@pytest.mark.slow
def test_a_server_from_start_to_stop(tmp_path):
    save_tiny(tmp_path / "tiny", "llama")
    environment = {
        **os.environ,
        "PYTHONPATH": str(SOURCES),
        "OMP_NUM_THREADS": "1",
        "PRONGHORN_TOKEN": "secret",
    }
    command = [sys.executable, "-m", "pronghorn.cli", "serve", str(tmp_path / "tiny"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        try:
            assert process.stdout is not None
            lines = []
            while not any("/v1" in line for line in lines):
                lines.append(process.stdout.readline())
                assert lines[-1], "it ended"
            assert any(line == "ready: tiny\n" for line in lines)
            address = re.search(r"http://127\.0\.0\.1:\d+", "".join(lines)).group()
            request = urllib.request.Request(
                f"{address}/v1/completions",
                json.dumps({"prompt": "The pronghorn", "max_tokens": 3}).encode(),
                {"Content-Type": "application/json", "Authorization": "Bearer secret"},
            )
            with urllib.request.urlopen(request, timeout=30) as response:
                assert json.load(response)["usage"]["completion_tokens"] >= 1
            process.send_signal(signal.SIGTERM)
            rest = process.communicate(timeout=30)[0]
            assert (process.returncode, rest.splitlines()[-1]) == (0, "stopped")
        finally:
            process.kill()
