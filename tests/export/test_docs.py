"""docs/export.md: its Python runs as it stands, and its limits are the code's."""

import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pronghorn.cli.export import FORMS
from pronghorn.export.checkpoint_gate import LIMITS
from pronghorn.export.gguf.methods import BY_LLAMA_CPP, NATIVE, Method
from pronghorn.loading import FastLanguageModel
from tests.export.hub_server import WRITE, running_hub
from tests.export.test_merged import logits, trained
from tests.tiny import save_tiny

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")


def test_its_snippets_run(tmp_path, monkeypatch):
    path = save_tiny(tmp_path / "base", "llama")
    model, tokenizer = FastLanguageModel.from_pretrained(str(path), dtype="float32", load_in_4bit=False)
    names = {"model": trained(model), "tokenizer": tokenizer}
    expected = logits(names["model"])
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: WRITE)
    snippets = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(snippets) == 4
    with running_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        for snippet in snippets:
            exec(snippet, names)
        assert hub.private == {"me/animal-lora": True, "me/animal": True, "me/animal-gguf": False}
    for name in ("again", "with_adapter"):
        torch.testing.assert_close(logits(names[name]), expected, atol=1e-4, rtol=1e-4)
    assert all(isinstance(names[name], PreTrainedModel) for name in ("eight_bits", "four_bits", "from_gguf"))
    assert names["words"].chat_template == tokenizer.chat_template


def rows():
    """First cell -> the others of the table of forms."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:1] == "|"
    ]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.parametrize("form", LIMITS)
def test_its_limits_for_checkpoints(form):
    limits = LIMITS[form]
    assert rows()[f"`{form}`"][2:] == [f"{limits.divergence:.2f}", f"{limits.lost * 100:.0f} %"]


@pytest.mark.parametrize("name", [*NATIVE, *BY_LLAMA_CPP])
def test_its_limits_for_gguf(name):
    limits = Method(name).limits
    row, position = next(
        (row, index)
        for first, row in rows().items()
        if first.startswith("GGUF `")
        for index, pattern in enumerate(re.findall(r"`([^`]*)`", first))
        if re.fullmatch(pattern.replace("*", ".*"), name)
    )
    divergence, lost = (cell.removesuffix(" %").split(", ") for cell in row[2:])
    assert float(divergence[min(position, len(divergence) - 1)]) == limits.divergence
    assert float(lost[min(position, len(lost) - 1)]) == pytest.approx(limits.lost * 100)


def test_its_forms_are_the_commands():
    assert all(re.search(rf"[`( ]{form}[`), ]", PAGE) for form in FORMS)
