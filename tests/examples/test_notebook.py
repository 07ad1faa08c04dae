"""examples/quickstart.ipynb runs top to bottom; here on a tiny model, for a few steps, by the code of its cells."""

import json
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pronghorn import hardware
from pronghorn.cli import models
from pronghorn.data import docstrings
from pronghorn.loading import fast
from tests.tiny import save_tiny

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def sources():
    """(code, tags) of the cells that run."""
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in code]


def small_library(folder):
    """A few modules of Python's library; reading all of them takes longer than everything else here."""
    folder.mkdir()
    for module in ("posixpath", "shutil", "textwrap"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{module}.py", folder)
    return folder


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the trainer would take the GPU, the tiny model the CPU"
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_runs_top_to_bottom(tmp_path, monkeypatch, capsys):
    """Its cells share names and nothing else; after the cell tagged `parameters` come ours, as papermill does it."""
    tiny = save_tiny(tmp_path / "tiny", "llama", vocab_size=320)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fast, "probe", hardware._cpu_hardware)
    monkeypatch.setattr(models, "find_quickstart_model", lambda: tiny)
    rows = docstrings.docstring_rows(small_library(tmp_path / "library"))
    monkeypatch.setattr(docstrings, "docstring_rows", lambda: rows)
    names = {"__name__": "__main__"}
    for number, (source, tags) in enumerate(sources()):
        exec(compile(source, f"<cell {number}>", "exec"), names)
        if "parameters" in tags:
            names |= {"STEPS": 3, "ROWS_PER_STEP": 2, "HELD_BACK": 4}
    assert names["trainer"].state.global_step == 3
    assert names["loss_after"] < names["loss_before"]
    assert names["same"] is True
    assert (tmp_path / "outputs/notebook/adapter/adapter_config.json").exists()
    assert "held-back loss" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained(tmp_path / "outputs" / "notebook" / "merged")


def test_nothing_of_a_run_is_committed():
    for cell in CELLS:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert [tags for _, tags in sources() if tags] == [["parameters"]]
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    assert sys.prefix not in NOTEBOOK.read_text(encoding="utf-8")
