"""``pronghorn quantise``: a table or JSON, and a folder that loads."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

from pronghorn import hardware
from pronghorn.cli.main import main
from pronghorn.loading import fast
from tests.tiny import save_tiny


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(fast, "probe", hardware._cpu_hardware)
    lines = [f"line {i} of a pronghorn that ate sagebrush {i * i} times" for i in range(120)]
    (tmp_path / "rows.txt").write_text("\n".join(lines), encoding="utf-8")
    return save_tiny(tmp_path / "tiny", "llama")


def command(tiny, *more):
    rows, out = tiny.parent / "rows.txt", tiny.parent / "out"
    return main(["quantise", str(tiny), "--output", str(out), "--data", str(rows), "--tokens", "600", *more])


def test_it_measures_writes_and_checks(tiny, capsys):
    assert command(tiny, "--budget", "30%") == 0
    shown = capsys.readouterr().out
    assert "Linear layers, worst first (14 of 14)" in shown and "to the original: KL" in shown
    assert "transformers: KL" in shown and "16 bit" in shown
    note = json.loads((tiny.parent / "out/quantisation.json").read_text(encoding="utf-8"))
    assert note["original"] == str(tiny) and len(note["modules"]) == 14
    kept = {module["name"] for module in note["modules"] if module["stored_as"] == "16 bit"}
    again = AutoModelForCausalLM.from_pretrained(tiny.parent / "out", device_map={"": "cpu"})
    for name, module in again.named_modules():
        if name.endswith("_proj"):
            assert (type(module).__name__ == "Linear") == (name in kept)


def test_json_is_one_line_that_says_what_is_better(tiny, capsys):
    assert command(tiny, "--budget", "0", "--json") == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["bytes"] <= found["plain_bytes"] and found["checks"][0]["passed"]
    assert found["predictions"]["fitted"]["kl"] < found["predictions"]["plain"]["kl"]


def test_mistakes_are_one_line(tiny, capsys):
    assert command(tiny, "--budget", "plenty") == 2
    assert "no amount of bytes" in capsys.readouterr().err
    (tiny.parent / "rows.txt").write_text("", encoding="utf-8")
    assert command(tiny) == 2
    assert "[PH3" in capsys.readouterr().err


def test_a_mixture_is_refused_before_it_is_measured(tiny, capsys):
    mixture = save_tiny(tiny.parent / "mixture", "mixtral", num_local_experts=4)
    assert command(mixture) == 2
    assert "no form of 4 bits in a checkpoint" in capsys.readouterr().err
