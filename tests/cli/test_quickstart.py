"""`pronghorn quickstart` with a tiny model in place of the real one, and with none."""

from importlib.metadata import PackageNotFoundError

import pytest

from pronghorn.cli import models, quickstart
from pronghorn.cli.main import main
from pronghorn.data.docstrings import DocRow
from pronghorn.errors import PackageMissing
from tests.tiny import save_tiny


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The quickstart on a tiny model and a few rows."""
    model = save_tiny(tmp_path / "model", "llama")
    monkeypatch.setattr(quickstart, "find_quickstart_model", lambda: model)
    rows = [DocRow(f"module.name{i}", f"What does name{i} do?", f"It counts to {i}.") for i in range(20)]
    rows += [DocRow(name, f"What does {name} do?", "It does what it says.") for name in quickstart.ASKED]
    monkeypatch.setattr("pronghorn.data.docstrings.docstring_rows", lambda: rows)
    plan = quickstart.Plan(steps=4, rows_per_step=4, held_back=6, learning_rate=1e-2, rank=4, max_length=128)
    monkeypatch.setattr(quickstart.Plan, "on", staticmethod(lambda device: plan))
    return tmp_path / "out"


def test_from_the_model_to_a_merged_one(tiny, capsys):
    assert main(["quickstart", "--out", str(tiny)]) == 0
    shown = capsys.readouterr().out
    for text in (
        "17 rows to train on, 6 held back",
        "before",
        "after",
        "adapted weights looked for",
        "tokens/s",
    ):
        assert text in shown
    assert all(name in shown for name in quickstart.ASKED)
    assert str(tiny / "checkpoints" / "report.html") in shown
    assert (tiny / "checkpoints" / "report.html").is_file()

    from peft import PeftConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert PeftConfig.from_pretrained(tiny / "adapter").r == 4
    AutoModelForCausalLM.from_pretrained(tiny / "merged")
    assert AutoTokenizer.from_pretrained(tiny / "merged").chat_template


def test_steps_are_as_asked(tiny, capsys):
    assert main(["quickstart", "--out", str(tiny), "--steps", "1"]) == 0
    assert "1, " in next(
        line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("steps")
    )


def test_output_folder_that_is_a_file(tiny, capsys):
    tiny.write_text("")
    assert main(["quickstart", "--out", str(tiny)]) == 2
    assert "[PH402]" in capsys.readouterr().err


def test_without_the_model_it_says_what_is_missing(monkeypatch, tmp_path, capsys):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(models, "files", absent)
    assert main(["quickstart", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "[PH403]" in error
    assert models.INSTALL_MODEL in error


def test_without_the_reader_of_its_file(monkeypatch, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    class Entry:
        name = "model.gguf"

        def locate(self):
            return tmp_path / "model.gguf"

    monkeypatch.setattr(models, "files", lambda name: [Entry()])
    assert models.find_quickstart_model() == tmp_path / "model.gguf"
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(PackageMissing, match="gguf"):
        models.find_quickstart_model()
